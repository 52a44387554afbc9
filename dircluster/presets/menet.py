"""ME-Net (Yang et al., ICML 2019) and ME-Net-A, its adversarially trained form: settings, presets, printed numbers.

A preset's docstring is a promise: the command, what it costs, and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dircluster.config import (
    AttackConfig,
    OptimizerConfig,
    RunConfig,
    TargetConfig,
    TrainingConfig,
    as_by_itself,
    require,
)
from dircluster.presets import base
from dircluster.presets.base import as_one_of, with_smoke_twins
from dircluster.presets.compared import as_svhn

Method = Literal["usvt", "soft_impute", "nuclear_norm"]
READ_BY: dict[Method, tuple[str, ...]] = {
    "usvt": ("rank",),
    "soft_impute": ("shrinkage", "iterations", "tolerance"),
    "nuclear_norm": ("weight", "iterations", "tolerance"),
}
"""Settings of an estimation that not all methods read."""


@dataclass(frozen=True)
class EstimationConfig:
    """What a mask keeps of an image when the defense answers, and how the rest is estimated."""

    method: Method = "usvt"
    """usvt: the largest singular values of the masked matrix; soft_impute and nuclear_norm: iterated thresholds."""
    kept: float = 0.5
    """Chance of each entry, a pixel of one channel, to be kept."""
    rank: float = 0.8
    """usvt: share of the singular values that stay, rounded down."""
    shrinkage: float = 0.02
    """soft_impute: the threshold, a share of the largest singular value of the masked matrix."""
    weight: float = 1.0
    """nuclear_norm: weight of the norm beside the squared error on what is kept, of values in [-1, 1]."""
    iterations: int = 100
    """soft_impute, nuclear_norm: most steps."""
    tolerance: float = 1e-3
    """soft_impute, nuclear_norm: relative change below which an image is done."""

    @property
    def canonical(self) -> EstimationConfig:
        """The same estimation in one form: what its method does not read is as it is by itself."""
        own = {name for names in READ_BY.values() for name in names}
        return as_by_itself(self, EstimationConfig(), *own.difference(READ_BY[self.method]))

    def __post_init__(self) -> None:
        for name in ("kept", "rank"):
            value = getattr(self, name)
            require(0 < value <= 1, f"model.{name} must lie in (0, 1], got {value}")
        for name in ("shrinkage", "weight", "iterations", "tolerance"):
            value = getattr(self, name)
            require(value > 0, f"model.{name} must be positive, got {value}")


@dataclass(frozen=True)
class MenetConfig:
    """Training: the classifier of section ``target`` learns on estimated images alone."""

    lowest: float = 0.4
    """Each image's chance of an entry to be kept is drawn every time again, uniform from this ..."""
    highest: float = 0.6
    """... to this."""

    def __post_init__(self) -> None:
        require(
            0 < self.lowest <= self.highest <= 1,
            f"menet.lowest and menet.highest must rise within (0, 1], got {self.lowest} and {self.highest}",
        )


@dataclass(frozen=True)
class MenetRun(RunConfig):
    """One whole run of ME-Net: its classifier by ``target.objective`` natural (ME-Net) or at (ME-Net-A), evaluation."""

    defense: ClassVar[str] = "menet"

    model: EstimationConfig = EstimationConfig()
    menet: MenetConfig = MenetConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        objective, rows = self.target.objective, self.data.height
        require(
            objective in ("natural", "at"),
            f"target.objective must be natural (ME-Net) or at (ME-Net-A), got {objective}",
        )
        require(
            self.target.uri is None,
            "target.uri has no use for menet: its classifier is trained from scratch, on estimated images",
        )
        require(
            self.model.method != "usvt" or int(self.model.rank * rows) > 0,
            f"model.rank {self.model.rank} leaves none of the {rows} singular values of {rows} rows",
        )
        awp = self.target.awp
        require(not awp, f"target.awp has no use for menet, whose training has no such step, got {awp}")

    @property
    def canonical(self) -> MenetRun:
        run = super().canonical
        return replace(run, model=run.model.canonical)

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        own = as_one_of(self, cifar10_menet(), cifar10_menet_a())
        return {"menet": {"bpda40": PRINTED[self.data.name][self.target.objective]}} if own else {}


PRINTED = {"cifar10": {"natural": 15.26, "at": 32.10}}
"""Percent under BPDA with EOT and PGD-40, Table 3 of the DIR paper, which gives neither the estimation, nor the share
that is kept, nor the draws, images and step size; by ``target.objective``."""


def digits_menet() -> MenetRun:
    """ME-Net on scikit-learn's 8x8 digits: USVT keeps 6 of 8 singular values, natural training.

    ``python jobs/train.py digits_menet``: a minute on two CPU cores. Measured in docs/results.md.
    """
    return base.digits(MenetRun, name="digits_menet", target=_of_digits("natural", epochs=60))


def digits_menet_a() -> MenetRun:
    """ME-Net-A on digits: as ``digits_menet``, trained on PGD-7 through new masks at each step, by BPDA.

    ``python jobs/train.py digits_menet_a``: minutes on two CPU cores. Measured in docs/results.md.
    """
    run = digits_menet()
    target = _of_digits("at", epochs=100)
    return replace(
        run, name="digits_menet_a", target=target, attack=replace(run.attack, steps=7, training_step_size=None)
    )


def cifar10_menet() -> MenetRun:
    """ME-Net on CIFAR-10: ResNet-18 on images of which USVT keeps 25 of 32 singular values, natural training.

    ``python jobs/train.py cifar10_menet`` on a machine with a GPU: 1.7 GMAC an image and epoch, 1.5e16 MAC in all. Its
    accuracy has not been measured yet; the DIR paper prints 15.26 % under BPDA with EOT (Table 3). The authors estimate
    ten masks of each image once, store them, and crop and flip what they stored; here each image has a new mask every
    epoch, and is cropped and flipped before.
    """
    return base.cifar10(
        MenetRun,
        name="cifar10_menet",
        target=TargetConfig(
            architecture="resnet18",
            objective="natural",
            epochs=200,
            optimizer=OptimizerConfig(lr=0.1, weight_decay=1e-4, milestones=(100, 150)),
        ),
        training=TrainingConfig(batch_size=256),
    )


def cifar10_menet_a() -> MenetRun:
    """ME-Net-A on CIFAR-10: as ``cifar10_menet``, trained on PGD-7 of 2/255 through new masks at each step, by BPDA.

    ``python jobs/train.py cifar10_menet_a``: 9.4 GMAC an image and epoch, 4.2e16 MAC in all. Its accuracy has not been
    measured yet; the DIR paper prints 32.10 % under BPDA with EOT (Table 3). The authors train 200 epochs with their
    network in training mode while samples are crafted; here it is in eval mode, and 100 epochs are enough.
    """
    run = cifar10_menet()
    optimizer = replace(run.target.optimizer, milestones=(50, 75))
    target = replace(run.target, objective="at", epochs=100, optimizer=optimizer)
    return replace(run, name="cifar10_menet_a", target=target, attack=AttackConfig(steps=7))


def svhn_menet() -> MenetRun:
    """ME-Net on SVHN: as ``cifar10_menet``, without flips. ``python jobs/train.py svhn_menet``; not measured yet."""
    return as_svhn(cifar10_menet())


def svhn_menet_a() -> MenetRun:
    """ME-Net-A on SVHN: as ``cifar10_menet_a``, without flips. ``python jobs/train.py svhn_menet_a``; not measured."""
    return as_svhn(cifar10_menet_a())


def _of_digits(objective: Literal["natural", "at"], epochs: int) -> TargetConfig:
    usual = base.digits(MenetRun).target
    return replace(usual, objective=objective, epochs=epochs, optimizer=replace(usual.optimizer, warmup_epochs=5))


PRESETS = with_smoke_twins(
    (digits_menet, digits_menet_a, cifar10_menet, cifar10_menet_a, svhn_menet, svhn_menet_a),
    lambda run: run,  # its own sections cost nothing
)
