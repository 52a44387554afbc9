"""APE-GAN (Jin et al. 2019), plain and adversarially trained (apegan_a): settings, presets, and printed numbers.

A preset's docstring is a promise: the command, what it costs, and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from dircluster.config import HOW_TRAINED, OptimizerConfig, RunConfig, require, require_positive
from dircluster.presets import base
from dircluster.presets.base import NO_DEFENSE, TABLE_1, as_one_of, with_smoke_twins
from dircluster.presets.compared import PIPELINE_CRAFTING, AdversarialConfig, as_svhn, short_adversarial

ADAM = OptimizerConfig(name="adamw", lr=2e-4, momentum=0.5, beta2=0.999, weight_decay=0.0, schedule="constant")
"""Adam as in the authors' code: AdamW without decay, its first beta 0.5, at a constant rate."""


@dataclass(frozen=True)
class GanConfig:
    """Generator and discriminator."""

    features: int = 64
    """Channels of their first layers; the published networks have 64."""

    def __post_init__(self) -> None:
        require_positive("model", self, "features")


@dataclass(frozen=True)
class ApeganConfig:
    """Stage 1: the generator learns to give the natural image, and what the discriminator takes for one."""

    content: Literal["rmse", "mse"] = "rmse"
    """Distance to the natural image in units of [-1, 1]. rmse: the root of the mean square over the whole batch (the
    authors' code); mse: the mean square (their text), beside which the discriminator's term rules."""
    content_weight: float = 0.7
    """Its weight: 0.7 in the text and the first code, 0.9 in the authors' last."""
    adversarial_weight: float = 0.3
    """Weight of the discriminator's cross-entropy: 0.3, and 0.02 in the authors' last code."""
    generator_steps: int = 2
    """Updates of the generator to one of the discriminator: 2 in the authors' code, 1 in their text."""
    natural: float = 0.5
    """Share of images that stay natural, drawn for each image and step; the others are attacked."""
    epochs: int = 30
    """Passes over the training split."""
    keep: Literal["best", "last"] = "best"
    """What this stage and that of APE-GAN_A end on: their best held-out weights by robust accuracy, or their last. A
    GAN's losses may oscillate, so these may be far apart."""
    optimizer: OptimizerConfig = ADAM
    """Of the generator, and of the discriminator."""

    def __post_init__(self) -> None:
        require_positive("apegan", self, "epochs", "generator_steps")
        require(0 <= self.natural < 1, f"apegan.natural must lie in [0, 1), got {self.natural}")
        for name in ("content_weight", "adversarial_weight"):
            value = getattr(self, name)
            require(value >= 0, f"apegan.{name} must be 0 or more, got {value}")


@dataclass(frozen=True)
class ApeganRun(RunConfig):
    """One whole run of APE-GAN: target, generator and discriminator, evaluation."""

    defense: ClassVar[str] = "apegan"
    unread: ClassVar[tuple[str, ...]] = HOW_TRAINED
    later: ClassVar[Mapping[str, Any]] = {"apegan.keep": "best"}

    model: GanConfig = GanConfig()
    apegan: ApeganConfig = ApeganConfig()

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            side = getattr(self.data, name)
            require(side % 8 == 0, f"data.{name} must be a multiple of 8 for APE-GAN, which halves thrice, got {side}")
        super().__post_init__()

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        return PRINTED[self.data.name] if as_one_of(self, cifar10_apegan(), svhn_apegan()) else {}


@dataclass(frozen=True)
class ApeganAdversarialRun(ApeganRun):
    """One whole run of APE-GAN_A: target, APE-GAN, APE-GAN trained on against attacks on the pipeline, evaluation."""

    defense: ClassVar[str] = "apegan_a"
    crafting: ClassVar[tuple[str, ...]] = PIPELINE_CRAFTING

    adversarial: AdversarialConfig = AdversarialConfig(optimizer=ADAM)

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        own = as_one_of(self, cifar10_apegan_a(), svhn_apegan_a())
        return {"none": NO_DEFENSE[self.data.name]} if own else {}  # Figure 6b names no numbers


AnyApegan = TypeVar("AnyApegan", bound=ApeganRun)

PRINTED: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "none": NO_DEFENSE["cifar10"],
        "apegan": dict(zip(TABLE_1, (84.79, 28.65, 12.91, 30.02, 29.96), strict=True)),
    },
    "svhn": {
        "none": NO_DEFENSE["svhn"],
        "apegan": dict(zip(TABLE_1, (90.76, 33.14, 17.89, 35.07, 34.98), strict=True)),
    },
}
"""Percent, Table 1 of the DIR paper."""


def digits_apegan() -> ApeganRun:
    """APE-GAN on scikit-learn's 8x8 digits over the target of ``digits``: half the channels, at a higher rate.

    ``python jobs/train.py digits_apegan``: minutes on two CPU cores. AutoAttack leaves it
    50.6 ± 2.4 % where it leaves the bare target 62.2 ± 1.1 (three seeds, docs/results.md).
    """
    return base.digits(
        ApeganRun,
        name="digits_apegan",
        model=GanConfig(features=32),
        apegan=ApeganConfig(epochs=60, optimizer=replace(ADAM, lr=1e-3)),
    )


def cifar10_apegan() -> ApeganRun:
    """APE-GAN on CIFAR-10 over the target of ``cifar10``: the published networks, 30 epochs, half of images natural.

    ``python jobs/train.py cifar10_apegan`` on a machine with a GPU ends on the best held-out epoch, and with
    ``--apegan.keep last`` on the last. Its accuracy has not been measured yet; the DIR paper prints 84.79 % natural and
    28.65 % under PGD-20 (CIFAR-10, Table 1).
    """
    return base.cifar10(ApeganRun, name="cifar10_apegan")


def cifar10_small_apegan() -> ApeganRun:
    """APE-GAN on CIFAR-10 for two CPU cores: over the target of ``cifar10_small``, the published networks.

    ``python jobs/train.py cifar10_small_apegan``: an hour on two cores with AMX. 60.2 % natural and 20.9 % under MALT,
    of 60.2 and 31.3 of the target alone (``zoo:cifar10-small-apegan``, first 1,000 test images).
    """
    return base.cifar10_small(ApeganRun, name="cifar10_small_apegan", apegan=ApeganConfig(epochs=10))


def svhn_apegan() -> ApeganRun:
    """APE-GAN on SVHN: as ``cifar10_apegan``, without flips.

    ``python jobs/train.py svhn_apegan``. Its accuracy has not been measured yet; the DIR paper prints 90.76 % natural
    and 33.14 % under PGD-20 (SVHN, Table 1).
    """
    return as_svhn(cifar10_apegan())


def digits_apegan_a() -> ApeganAdversarialRun:
    """APE-GAN_A on digits: ``digits_apegan``, then 20 epochs on attacks on the whole pipeline.

    ``python jobs/train.py digits_apegan_a``: minutes on two CPU cores. MALT leaves it 61.6 %
    where it leaves the bare target 61.0 (one seed, docs/results.md).
    """
    run = digits_apegan()
    return base.digits(
        ApeganAdversarialRun,
        name="digits_apegan_a",
        model=run.model,
        apegan=run.apegan,
        adversarial=AdversarialConfig(epochs=20, optimizer=run.apegan.optimizer),
    )


def cifar10_apegan_a() -> ApeganAdversarialRun:
    """APE-GAN_A on CIFAR-10: ``cifar10_apegan``, then 30 epochs on attacks on the whole pipeline.

    ``python jobs/train.py cifar10_apegan_a`` on a machine with a GPU. Its accuracy has not been measured yet.
    """
    return base.cifar10(ApeganAdversarialRun, name="cifar10_apegan_a")


def svhn_apegan_a() -> ApeganAdversarialRun:
    """APE-GAN_A on SVHN: as ``cifar10_apegan_a``, without flips.

    ``python jobs/train.py svhn_apegan_a``. Its accuracy has not been measured yet.
    """
    return as_svhn(cifar10_apegan_a())


def smaller(run: AnyApegan) -> AnyApegan:
    """APE-GAN's own sections for a smoke run."""
    return replace(run, model=GanConfig(features=8), apegan=replace(run.apegan, epochs=2))


def smaller_a(run: ApeganAdversarialRun) -> ApeganAdversarialRun:
    """APE-GAN_A's own sections for a smoke run."""
    return replace(smaller(run), adversarial=short_adversarial(run.adversarial))


PRESETS = {
    **with_smoke_twins((digits_apegan, cifar10_apegan, cifar10_small_apegan, svhn_apegan), smaller),
    **with_smoke_twins((digits_apegan_a, cifar10_apegan_a, svhn_apegan_a), smaller_a),
}
