"""EBM (Hill, Mitchell and Zhu, ICLR 2021), a Langevin purifier: its settings, presets, and printed numbers.

A preset's docstring is a promise: the command, what it costs, and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from dircluster.config import (
    HOW_TRAINED,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    as_by_itself,
    require,
    require_positive,
)
from dircluster.presets import base
from dircluster.presets.base import as_one_of, short_rates, with_smoke_twins
from dircluster.presets.compared import as_svhn

MOST_STEPS, MOST_REPLICATES = 100_000, 10_000
"""More of them are a mistake: an answer would take hours, or more memory than there is."""


@dataclass(frozen=True)
class EnergyConfig:
    """The energy, and the Langevin chains that purify. Lengths are in units of [-1, 1], twice those of pixels."""

    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Channels of each stage of the energy, from full resolution down; every stage but the first halves the sides."""
    activation: Literal["leaky_relu", "silu"] = "leaky_relu"
    """leaky_relu: the published network, linear in pieces; silu: a smooth one, whose chains have a gradient that is not
    the identity's."""
    steps: int = 1500
    """Langevin steps that purify an image."""
    noise: float = 1e-2
    """Length of the noise of a step, in training too."""
    replicates: int = 15
    """Chains whose logits are averaged into a prediction."""

    def __post_init__(self) -> None:
        require_positive("model", self, "steps", "noise", "replicates")
        require(self.steps <= MOST_STEPS, f"model.steps must be at most {MOST_STEPS}, got {self.steps}")
        require(
            self.replicates <= MOST_REPLICATES,
            f"model.replicates must be at most {MOST_REPLICATES}, got {self.replicates}",
        )
        require(
            len(self.widths) > 0 and min(self.widths) > 0,
            f"model.widths must be one or more positive numbers, got {self.widths}",
        )


@dataclass(frozen=True)
class EbmConfig:
    """Training: the energy falls at images with a little noise, and rises where persistent chains have got to."""

    chains: int = 50_000
    """Persistent chains, started uniformly in [-1, 1]; a batch moves as many of them as it has images."""
    steps: int = 100
    """Langevin steps of a chain at each update."""
    data_noise: float = 0.02
    """Standard deviation of the noise on images, in units of [-1, 1]."""
    epochs: int = 278
    """Passes over the training split with ``optimizer``."""
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", lr=1e-4, beta2=0.999, weight_decay=0.0, schedule="constant"
    )
    """Adam: AdamW without decay."""
    last_epochs: int = 278
    """Passes with ``last_optimizer`` after those; 0 leaves them out."""
    last_optimizer: OptimizerConfig = OptimizerConfig(
        name="sgd", lr=2.5e-9, momentum=0.0, weight_decay=0.0, schedule="constant"
    )
    """Plain SGD. The loss is divided by noise^2 / 2: the rate on the difference of energies is 5e-5."""

    def __post_init__(self) -> None:
        require_positive("ebm", self, "chains", "steps", "epochs")
        require(self.data_noise >= 0, f"ebm.data_noise must be 0 or more, got {self.data_noise}")
        require(self.last_epochs >= 0, f"ebm.last_epochs must be 0 or more, got {self.last_epochs}")


@dataclass(frozen=True)
class EbmRun(RunConfig):
    """One whole run of EBM: a naturally trained target, the energy, evaluation."""

    defense: ClassVar[str] = "ebm"
    unread: ClassVar[tuple[str, ...]] = HOW_TRAINED

    model: EnergyConfig = EnergyConfig(widths=(32, 64), steps=50)  # of the default data, 8x8 digits
    ebm: EbmConfig = EbmConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        halved = 2 ** (len(self.model.widths) - 1)
        for name in ("height", "width"):
            side = getattr(self.data, name)
            require(
                side % halved == 0,
                f"model.widths has {len(self.model.widths)} stages, which halve images {len(self.model.widths) - 1}"
                f" times, but data.{name} is {side}, not a multiple of {halved}",
            )
        batch = self.training.batch_size
        require(
            self.ebm.chains >= batch,
            f"ebm.chains must be at least training.batch_size {batch}, got {self.ebm.chains}: a batch moves each once",
        )
        require(
            self.scaling.most == 1,
            f"scaling.workers must be 1 for ebm, whose chains lie with one worker, got {self.scaling.workers}",
        )

    @property
    def canonical(self) -> EbmRun:
        run = super().canonical
        unread = () if run.ebm.last_epochs else ("last_optimizer",)
        return replace(run, ebm=as_by_itself(run.ebm, EbmConfig(), *unread))

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        ours = cifar10_ebm()
        own = as_one_of(self, ours, replace(ours, target=replace(ours.target, architecture="wrn-28-10")))
        return {"ebm": {"bpda40": PRINTED[self.data.name]}} if own else {}


PRINTED = {"cifar10": 51.43}
"""Percent under BPDA with EOT, Table 3 of the DIR paper, which gives neither classifier, chains, nor images."""


def digits_ebm() -> EbmRun:
    """EBM on scikit-learn's 8x8 digits: a short form, not the paper's, over a naturally trained target.

    ``python jobs/train.py digits_ebm``: minutes on two CPU cores. A small energy, 600 updates of 20 Langevin steps, 50
    steps to purify, five chains a prediction; noise grows with the radius of the attack, five times that of CIFAR-10.
    It is judged on 100 test images; what came stands in docs/results.md.
    """
    run = base.digits(
        EbmRun,
        name="digits_ebm",
        model=EnergyConfig(widths=(32, 64), steps=50, noise=0.05, replicates=5),
        ebm=EbmConfig(
            chains=2000,
            steps=20,
            data_noise=0.1,
            epochs=60,
            last_epochs=0,
            optimizer=replace(EbmConfig().optimizer, lr=1e-3),
        ),
        evaluation=EvaluationConfig(images=100, eot=2, draws=4),
    )
    return replace(run, target=replace(run.target, objective="natural", epochs=60))


def cifar10_ebm() -> EbmRun:
    """EBM on CIFAR-10 with the published numbers, over our naturally trained ResNet-18: for a large budget.

    ``python jobs/train.py cifar10_ebm``: 250,000 batches of 100, 1.3e17 MAC, four times an adversarially trained
    target; an image takes 78 GMAC a chain to purify, and 15 chains a prediction. It is judged on 500 test images, each
    on ten draws of 15 chains. Its accuracy has not been measured yet; the DIR paper prints 51.43 % under BPDA with EOT
    (Table 3). The authors' classifier is a WRN-28-10, ``--target.architecture wrn-28-10``.
    """
    run = base.cifar10(
        EbmRun,
        name="cifar10_ebm",
        model=EnergyConfig(),
        training=TrainingConfig(batch_size=100),
        evaluation=EvaluationConfig(images=500, rows=64, eot=2, draws=10),
    )
    return replace(
        run,
        target=replace(run.target, objective="natural"),
        storage=replace(run.storage, checkpoint_every=5000),  # the chains are 600 MB
    )


def cifar10_ebm_short() -> EbmRun:
    """A short EBM on CIFAR-10 for small budgets, **not the paper's**: 10,000 batches by Adam, 200 steps to purify.

    ``python jobs/train.py cifar10_ebm_short``: 3.3 GMAC an image and update, 3.2e15 MAC, beside 8.2e15 of its target.
    Chains of 60 steps an update from 10,000 persistent ones; an energy that has seen so little may purify little. Its
    accuracy has not been measured yet.
    """
    run = cifar10_ebm()
    return replace(
        run,
        name="cifar10_ebm_short",
        model=replace(run.model, steps=200),
        ebm=replace(run.ebm, chains=10_000, steps=60, epochs=22, last_epochs=0),
    )


def svhn_ebm() -> EbmRun:
    """EBM on SVHN: as ``cifar10_ebm`` with more noise, without flips.

    ``python jobs/train.py svhn_ebm``; its accuracy has not been measured yet.
    """
    run = as_svhn(cifar10_ebm())
    return replace(
        run,
        model=replace(run.model, noise=1.75e-2),
        ebm=replace(
            run.ebm,
            data_noise=3e-2,
            epochs=190,
            last_epochs=190,
            last_optimizer=replace(run.ebm.last_optimizer, lr=2.5e-5 * 1.75e-2**2 / 2),
        ),
    )


def smaller(run: EbmRun) -> EbmRun:
    """EBM's own sections for a smoke run, with the last optimizer's stage where the run has one."""
    return replace(
        run,
        model=replace(run.model, widths=(4, 8), steps=3, replicates=2),
        ebm=replace(
            run.ebm,
            chains=128,
            steps=2,
            epochs=2,
            last_epochs=min(run.ebm.last_epochs, 1),
            optimizer=short_rates(run.ebm.optimizer),
        ),
    )


PRESETS = with_smoke_twins((digits_ebm, cifar10_ebm, cifar10_ebm_short, svhn_ebm), smaller)
