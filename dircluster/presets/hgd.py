"""HGD (Liao et al., CVPR 2018), plain and adversarially trained (hgd_a): settings, presets, and printed numbers.

A preset's docstring is a promise: the command, what it costs, and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from dircluster.config import HOW_TRAINED, DataConfig, OptimizerConfig, RunConfig, require, require_positive
from dircluster.presets import base
from dircluster.presets.base import NO_DEFENSE, TABLE_1, as_one_of, short_rates, with_smoke_twins
from dircluster.presets.compared import ADAM, PIPELINE_CRAFTING, AdversarialConfig, as_svhn, short_adversarial

Guidance = Literal["pixel", "feature", "logit", "class"]


@dataclass(frozen=True)
class UNetConfig:
    """DUNET, the U-net that gives what is added to an image."""

    widths: tuple[int, ...] = (64, 128, 256, 256, 256)
    """Channels of each encoder stage, from full resolution down; every stage but the first halves the sides."""
    units: tuple[int, ...] = (2, 3, 3, 3, 3)
    """Convolution units of each encoder stage."""
    variant: Literal["hgd", "cafd"] = "hgd"
    """hgd: the published network; cafd: the port in an earlier repository of the DIR paper's first author."""

    def __post_init__(self) -> None:
        stages = len(self.widths)
        require(stages >= 2, f"model.widths must name two stages or more, got {self.widths}")
        require(len(self.units) == stages, f"model.units must be as many as model.widths ({stages}), got {self.units}")
        for name in ("widths", "units"):
            value = getattr(self, name)
            require(min(value) > 0, f"model.{name} must be positive, got {value}")

    def check(self, data: DataConfig) -> None:
        """Raise ConfigError where the images are too small for so many stages."""
        side, stages = min(data.height, data.width), len(self.widths)
        require(
            side >= 2 ** (stages - 1),
            f"model.widths has {stages} stages, which halve images {stages - 1} times, but data.height or data.width is"
            f" {side}; give at most {side.bit_length()} widths and units",
        )


@dataclass(frozen=True)
class HgdConfig:
    """Stage 1: the U-net learns to undo attacks on the target alone, guided by what the target makes of it."""

    guidance: Guidance = "feature"
    """What must come out as for the natural image: pixels, the target's last feature map, its logits (mean absolute
    difference), or the true class (cross-entropy)."""
    natural: float = 0.5
    """Share of images that stay natural, drawn for each image and step; the others are attacked."""
    epochs: int = 30
    """Passes over the training split."""
    optimizer: OptimizerConfig = ADAM
    """Adam: AdamW without decay. Its rate falls at 60 % and 90 % of the epochs."""

    def __post_init__(self) -> None:
        require_positive("hgd", self, "epochs")
        require(0 <= self.natural < 1, f"hgd.natural must lie in [0, 1), got {self.natural}")


@dataclass(frozen=True)
class HgdRun(RunConfig):
    """One whole run of HGD: target, denoiser, evaluation."""

    defense: ClassVar[str] = "hgd"
    unread: ClassVar[tuple[str, ...]] = HOW_TRAINED
    later: ClassVar[Mapping[str, Any]] = {"hgd.optimizer.gamma": 0.1}

    model: UNetConfig = UNetConfig(widths=(64, 128, 256), units=(2, 3, 3))  # of the default data, 8x8 digits
    hgd: HgdConfig = HgdConfig()

    def __post_init__(self) -> None:
        self.model.check(self.data)
        super().__post_init__()

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        return PRINTED[self.data.name] if as_one_of(self, cifar10_hgd(), svhn_hgd()) else {}


@dataclass(frozen=True)
class HgdAdversarialRun(HgdRun):
    """One whole run of HGD_A: target, HGD, HGD trained on against attacks on the pipeline, evaluation."""

    defense: ClassVar[str] = "hgd_a"
    crafting: ClassVar[tuple[str, ...]] = PIPELINE_CRAFTING

    adversarial: AdversarialConfig = AdversarialConfig()

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        own = as_one_of(self, cifar10_hgd_a(), svhn_hgd_a())
        return {"none": NO_DEFENSE[self.data.name]} if own else {}  # Figure 6b names no numbers


AnyHgd = TypeVar("AnyHgd", bound=HgdRun)

PRINTED: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "none": NO_DEFENSE["cifar10"],
        "hgd": dict(zip(TABLE_1, (84.36, 18.07, 13.85, 19.67, 19.63), strict=True)),
    },
    "svhn": {
        "none": NO_DEFENSE["svhn"],
        "hgd": dict(zip(TABLE_1, (90.64, 27.49, 20.37, 28.83, 28.76), strict=True)),
    },
}
"""Percent, Table 1 of the DIR paper, which does not say by what the denoiser was guided."""


def digits_hgd() -> HgdRun:
    """HGD on scikit-learn's 8x8 digits over the target of ``digits``: a smaller U-net, 60 epochs.

    ``python jobs/train.py digits_hgd``: minutes on two CPU cores. AutoAttack leaves it
    57.6 ± 1.0 % where it leaves the bare target 62.2 ± 1.1 (three seeds, docs/results.md).
    """
    return base.digits(
        HgdRun,
        name="digits_hgd",
        model=UNetConfig(widths=(32, 64, 64), units=(2, 2, 2)),
        hgd=HgdConfig(epochs=60, optimizer=replace(HgdConfig().optimizer, milestones=(36, 54))),
    )


def cifar10_hgd() -> HgdRun:
    """HGD on CIFAR-10 over the target of ``cifar10``: the published U-net, 30 epochs, half of the images natural.

    ``python jobs/train.py cifar10_hgd`` on a machine with a GPU. Its accuracy has not been measured yet; the DIR paper
    prints 84.36 % natural and 18.07 % under PGD-20 (CIFAR-10, Table 1).
    """
    return base.cifar10(HgdRun, name="cifar10_hgd", model=UNetConfig())


def cifar10_small_hgd() -> HgdRun:
    """HGD on CIFAR-10 for two CPU cores: over the target of ``cifar10_small``, a quarter of the published channels.

    ``python jobs/train.py cifar10_small_hgd``: about an hour on two cores with AMX. 60.1 % natural and 31.3 % under
    MALT, of 60.2 and 31.3 of the target alone (``zoo:cifar10-small-hgd``, first 1,000 test images).
    """
    return base.cifar10_small(
        HgdRun,
        name="cifar10_small_hgd",
        model=UNetConfig(widths=(16, 32, 64, 64, 64)),
        hgd=HgdConfig(epochs=10, optimizer=replace(ADAM, milestones=(6, 9))),
    )


def svhn_hgd() -> HgdRun:
    """HGD on SVHN: as ``cifar10_hgd``, without flips.

    ``python jobs/train.py svhn_hgd``. Its accuracy has not been measured yet; the DIR paper prints 90.64 % natural and
    27.49 % under PGD-20 (SVHN, Table 1).
    """
    return as_svhn(cifar10_hgd())


def digits_hgd_a() -> HgdAdversarialRun:
    """HGD_A on digits: ``digits_hgd``, then 20 epochs on attacks on the whole pipeline.

    ``python jobs/train.py digits_hgd_a``: minutes on two CPU cores. MALT leaves it 61.8 %
    where it leaves the bare target 61.0 (one seed, docs/results.md).
    """
    run = digits_hgd()
    return base.digits(
        HgdAdversarialRun,
        name="digits_hgd_a",
        model=run.model,
        hgd=run.hgd,
        adversarial=AdversarialConfig(epochs=20, optimizer=replace(ADAM, milestones=(12, 18))),
    )


def cifar10_hgd_a() -> HgdAdversarialRun:
    """HGD_A on CIFAR-10: ``cifar10_hgd``, then 30 epochs on attacks on the whole pipeline.

    ``python jobs/train.py cifar10_hgd_a`` on a machine with a GPU. Its accuracy has not been measured yet; the DIR
    paper says that it stays below that of the bare target.
    """
    return base.cifar10(HgdAdversarialRun, name="cifar10_hgd_a", model=UNetConfig())


def svhn_hgd_a() -> HgdAdversarialRun:
    """HGD_A on SVHN: as ``cifar10_hgd_a``, without flips.

    ``python jobs/train.py svhn_hgd_a``. Its accuracy has not been measured yet.
    """
    return as_svhn(cifar10_hgd_a())


def smaller(run: AnyHgd) -> AnyHgd:
    """HGD's own sections for a smoke run."""
    return replace(
        run,
        model=UNetConfig(widths=(8, 16), units=(1, 2)),
        hgd=replace(run.hgd, epochs=2, optimizer=short_rates(run.hgd.optimizer)),
    )


def smaller_a(run: HgdAdversarialRun) -> HgdAdversarialRun:
    """HGD_A's own sections for a smoke run."""
    return replace(smaller(run), adversarial=short_adversarial(run.adversarial))


PRESETS = {
    **with_smoke_twins((digits_hgd, cifar10_hgd, cifar10_small_hgd, svhn_hgd), smaller),
    **with_smoke_twins((digits_hgd_a, cifar10_hgd_a, svhn_hgd_a), smaller_a),
}
