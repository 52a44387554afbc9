"""The control that gives a purifier's compute to the target: g(x) = x, and the target trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from dircluster.config import OptimizerConfig, RunConfig, require_positive
from dircluster.presets import base
from dircluster.presets.base import short_rates, with_smoke_twins
from dircluster.presets.compared import as_svhn


@dataclass(frozen=True)
class FinetuneConfig:
    """Stage 1: the target trains on, by its own objective and threat."""

    epochs: int = 40
    """Passes over the training split: as many as cost what the denoiser that it stands beside does. On CIFAR-10, beside
    the presets as they are, 25 for apegan, 40 for hgd, 89 for nrp, 175 for jatp, 475 for dir."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=0.01, schedule="cosine")
    """Of the target: a tenth of its first rate, down to zero."""

    def __post_init__(self) -> None:
        require_positive("finetune", self, "epochs")


@dataclass(frozen=True)
class FinetuneRun(RunConfig):
    """The target of the other systems, trained on for as much compute as a denoiser takes."""

    defense: ClassVar[str] = "finetune"
    unread: ClassVar[tuple[str, ...]] = ("epochs", "ema", "optimizer")  # the rest says how it is trained on

    finetune: FinetuneConfig = FinetuneConfig()


def digits_finetune() -> FinetuneRun:
    """The target of ``digits`` trained on for what ``digits_hgd`` costs.

    ``python jobs/train.py digits_finetune``: minutes on two CPU cores. Row ``none`` of its tables is the
    target trained on: AutoAttack leaves it 65.0 ± 1.9 %, and before that 62.2 ± 1.1 (three seeds, docs/results.md).
    """
    optimizer = OptimizerConfig(name="adamw", lr=5e-4, weight_decay=5e-4, schedule="cosine", clip=1.0)
    return base.digits(FinetuneRun, name="digits_finetune", finetune=FinetuneConfig(370, optimizer))


def cifar10_finetune() -> FinetuneRun:
    """The target of ``cifar10`` trained on for what ``cifar10_hgd`` costs.

    ``python jobs/train.py cifar10_finetune`` on a machine with a GPU. Its accuracy has not been measured yet.
    """
    return base.cifar10(FinetuneRun, name="cifar10_finetune")


def cifar10_small_finetune() -> FinetuneRun:
    """The target of ``cifar10_small`` trained on for about what ``cifar10_small_hgd`` costs.

    ``python jobs/train.py cifar10_small_finetune``: three quarters of an hour on two cores with AMX. 61.0 %
    natural and 30.8 % under MALT, of 60.2 and 31.3 before (``zoo:cifar10-small-finetune``, first 1,000 test images).
    """
    return base.cifar10_small(FinetuneRun, name="cifar10_small_finetune", finetune=FinetuneConfig(epochs=15))


def svhn_finetune() -> FinetuneRun:
    """The target of ``svhn`` trained on for what ``svhn_hgd`` costs.

    ``python jobs/train.py svhn_finetune``. Its accuracy has not been measured yet.
    """
    return as_svhn(cifar10_finetune())


def smaller(run: FinetuneRun) -> FinetuneRun:
    """Its own section for a smoke run."""
    return replace(run, finetune=FinetuneConfig(2, short_rates(run.finetune.optimizer)))


PRESETS = with_smoke_twins((digits_finetune, cifar10_finetune, cifar10_small_finetune, svhn_finetune), smaller)
