"""NRP (Naseer et al., CVPR 2020), plain and adversarially trained (nrp_a): settings, presets, and printed numbers.

A preset's docstring is a promise: the command, what it costs, and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from dircluster.config import HOW_TRAINED, OptimizerConfig, RunConfig, as_by_itself, require, require_positive
from dircluster.presets import base, compared
from dircluster.presets.base import NO_DEFENSE, TABLE_1, as_one_of, with_smoke_twins
from dircluster.presets.compared import PIPELINE_CRAFTING, AdversarialConfig, as_svhn, short_adversarial

ADAM = replace(compared.ADAM, lr=1e-4)
"""Adam: AdamW without decay. Its rate falls at 60 % and 90 % of 30 epochs."""


@dataclass(frozen=True)
class NrpNetConfig:
    """The purifier, which has no way around it, and its critic."""

    network: Literal["rrdb", "resg"] = "rrdb"
    """rrdb: dense blocks, the paper's network; resg: plain residual blocks, its light one (23 of them)."""
    blocks: int = 5
    """Blocks; the public models for ImageNet have 23, at 4.6 times the cost for rrdb."""
    features: int = 64
    """Channels between blocks."""
    growth: int = 32
    """rrdb: channels that each convolution of a dense block adds."""
    critic_features: int = 32
    """Channels of the critic's first layers."""
    clamp: bool = False
    """Cut what the purifier makes to [0, 1] wherever it is not being trained: judged, attacked and deployed. The
    authors' scripts do so (purify.py where it stores images, bypass_nrp.py inside the attack). Off by
    itself: a pixel that is cut has no gradient, which makes attacks weaker and the defense no stronger."""

    def __post_init__(self) -> None:
        require_positive("model", self, "blocks", "features", "growth", "critic_features")


@dataclass(frozen=True)
class NrpConfig:
    """Stage 1: the purifier learns what looks natural to the target's early features, to pixels and to a critic."""

    layer: Literal["middle", "last"] = "middle"
    """Feature map of the target that is compared: the last of half the image's size (layer2 of a ResNet-18), or the
    last before pooling. The paper compares relu3_3 of a VGG-16 trained on ImageNet, which needs a download."""
    distance: Literal["mae", "mse"] = "mae"
    """Between feature maps: mean absolute or mean squared difference. The text that says which was not to be had."""
    samples: Literal["target", "ssp"] = "target"
    """target: PGD on the target's cross-entropy, as the DIR paper trains it; ssp: the method's own attack, which takes
    features of the same layer away from the natural image's, from clipped noise and without labels."""
    feature_weight: float = 1.0
    """Weight of the feature term."""
    image_weight: float = 1e-2
    """Weight of the mean squared difference of pixels."""
    adversarial_weight: float = 5e-3
    """Weight of the relativistic average term."""
    natural: float = 0.5
    """Share of images that stay natural, drawn for each image and step; the others are attacked."""
    epochs: int = 30
    """Passes over the training split."""
    optimizer: OptimizerConfig = ADAM
    """Of the purifier, and of the critic."""

    def __post_init__(self) -> None:
        require_positive("nrp", self, "epochs")
        require(0 <= self.natural < 1, f"nrp.natural must lie in [0, 1), got {self.natural}")
        for name in ("feature_weight", "image_weight", "adversarial_weight"):
            value = getattr(self, name)
            require(value >= 0, f"nrp.{name} must be 0 or more, got {value}")


@dataclass(frozen=True)
class NrpRun(RunConfig):
    """One whole run of NRP: target, purifier and critic, evaluation."""

    defense: ClassVar[str] = "nrp"
    unread: ClassVar[tuple[str, ...]] = HOW_TRAINED
    later: ClassVar[Mapping[str, Any]] = {"model.clamp": False}

    model: NrpNetConfig = NrpNetConfig()
    nrp: NrpConfig = NrpConfig()

    def __post_init__(self) -> None:
        side = min(self.data.height, self.data.width)
        require(side >= 4, f"data.height and data.width must be at least 4 for NRP's critic, got {side}")
        super().__post_init__()

    @property
    def canonical(self) -> NrpRun:
        run = super().canonical
        unread = ("growth",) if run.model.network == "resg" else ()
        return replace(run, model=as_by_itself(run.model, NrpNetConfig(), *unread))

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        return PRINTED[self.data.name] if as_one_of(self, cifar10_nrp(), svhn_nrp()) else {}


@dataclass(frozen=True)
class NrpAdversarialRun(NrpRun):
    """One whole run of NRP_A: target, NRP, NRP trained on against attacks on the pipeline, evaluation."""

    defense: ClassVar[str] = "nrp_a"
    crafting: ClassVar[tuple[str, ...]] = PIPELINE_CRAFTING

    adversarial: AdversarialConfig = AdversarialConfig(optimizer=ADAM)

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        own = as_one_of(self, cifar10_nrp_a(), svhn_nrp_a())
        return {"none": NO_DEFENSE[self.data.name]} if own else {}  # Figure 6b names no numbers


AnyNrp = TypeVar("AnyNrp", bound=NrpRun)

PRINTED: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "none": NO_DEFENSE["cifar10"],
        "nrp": dict(zip(TABLE_1, (84.53, 21.90, 15.32, 22.43, 22.37), strict=True)),
    },
    "svhn": {
        "none": NO_DEFENSE["svhn"],
        "nrp": dict(zip(TABLE_1, (90.71, 34.73, 21.84, 36.29, 36.21), strict=True)),
    },
}
"""Percent, Table 1 of the DIR paper, which does not say how deep the network was."""


def digits_nrp() -> NrpRun:
    """NRP on scikit-learn's 8x8 digits over the target of ``digits``: one narrow block, at a higher rate.

    ``python jobs/train.py digits_nrp``: minutes on two CPU cores. AutoAttack leaves it
    62.8 ± 1.2 % where it leaves the bare target 62.2 ± 1.1 (three seeds, docs/results.md).
    """
    return base.digits(
        NrpRun,
        name="digits_nrp",
        model=NrpNetConfig(blocks=1, features=32, growth=16, critic_features=16),
        nrp=NrpConfig(optimizer=replace(ADAM, lr=1e-3)),
    )


def cifar10_nrp() -> NrpRun:
    """NRP on CIFAR-10 over the target of ``cifar10``: 5 blocks, 30 epochs, half of the images natural.

    ``python jobs/train.py cifar10_nrp`` on a machine with a GPU; ``--parallel.activation-checkpointing`` where its
    memory is short. Its accuracy has not been measured yet; the DIR paper prints 84.53 % natural and 21.90 % under
    PGD-20 (CIFAR-10, Table 1).
    """
    return base.cifar10(NrpRun, name="cifar10_nrp")


def cifar10_small_nrp() -> NrpRun:
    """NRP on CIFAR-10 for two CPU cores: over the target of ``cifar10_small``, one block of a quarter of the channels.

    ``python jobs/train.py cifar10_small_nrp``: an hour on two cores with AMX. 60.0 % natural and 30.6 % under MALT, of
    60.2 and 31.3 of the target alone (``zoo:cifar10-small-nrp``, first 1,000 test images).
    """
    return base.cifar10_small(
        NrpRun,
        name="cifar10_small_nrp",
        model=NrpNetConfig(blocks=1, features=16, growth=8, critic_features=8),
        nrp=NrpConfig(epochs=10, optimizer=replace(ADAM, lr=1e-3, milestones=(6, 9))),
    )


def svhn_nrp() -> NrpRun:
    """NRP on SVHN: as ``cifar10_nrp``, without flips.

    ``python jobs/train.py svhn_nrp``. Its accuracy has not been measured yet; the DIR paper prints 90.71 % natural and
    34.73 % under PGD-20 (SVHN, Table 1).
    """
    return as_svhn(cifar10_nrp())


def digits_nrp_a() -> NrpAdversarialRun:
    """NRP_A on digits: ``digits_nrp``, then 20 epochs on attacks on the whole pipeline.

    ``python jobs/train.py digits_nrp_a``: minutes on two CPU cores. MALT leaves it 63.5 %
    where it leaves the bare target 61.0 (one seed, docs/results.md).
    """
    run = digits_nrp()
    return base.digits(
        NrpAdversarialRun,
        name="digits_nrp_a",
        model=run.model,
        nrp=run.nrp,
        adversarial=AdversarialConfig(epochs=20, optimizer=replace(run.nrp.optimizer, milestones=(12, 18))),
    )


def cifar10_nrp_a() -> NrpAdversarialRun:
    """NRP_A on CIFAR-10: ``cifar10_nrp``, then 30 epochs on attacks on the whole pipeline.

    ``python jobs/train.py cifar10_nrp_a`` on a machine with a GPU: its last epochs cost three times those of
    ``cifar10_nrp``. Its accuracy has not been measured yet.
    """
    return base.cifar10(NrpAdversarialRun, name="cifar10_nrp_a")


def svhn_nrp_a() -> NrpAdversarialRun:
    """NRP_A on SVHN: as ``cifar10_nrp_a``, without flips.

    ``python jobs/train.py svhn_nrp_a``. Its accuracy has not been measured yet.
    """
    return as_svhn(cifar10_nrp_a())


def smaller(run: AnyNrp) -> AnyNrp:
    """NRP's own sections for a smoke run."""
    model = replace(run.model, blocks=1, features=8, growth=4, critic_features=4)
    return replace(run, model=model, nrp=replace(run.nrp, epochs=2))


def smaller_a(run: NrpAdversarialRun) -> NrpAdversarialRun:
    """NRP_A's own sections for a smoke run."""
    return replace(smaller(run), adversarial=short_adversarial(run.adversarial))


PRESETS = {
    **with_smoke_twins((digits_nrp, cifar10_nrp, cifar10_small_nrp, svhn_nrp), smaller),
    **with_smoke_twins((digits_nrp_a, cifar10_nrp_a, svhn_nrp_a), smaller_a),
}
