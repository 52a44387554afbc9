"""What presets share: the tasks that defenses are compared on, and a small form of a run to see that all is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from dircluster.config import (
    AttackConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    ScalingConfig,
    StorageConfig,
    TargetConfig,
    TrackingConfig,
    TrainingConfig,
    flatten,
)

AnyRun = TypeVar("AnyRun", bound=RunConfig)


def digits(run: type[AnyRun], **own: Any) -> AnyRun:
    """A run on scikit-learn's 8x8 digits. All defenses have the same target there, and find it stored.

    Samples are those of PGD-3 with steps of half the radius, as strong as PGD-5 of a quarter in three fifths of the
    time (docs/results.md).
    """
    shared: dict[str, Any] = {
        "name": "digits",
        "data": DataConfig(name="digits", height=8, width=8, channels=1, crop_padding=1),
        "attack": AttackConfig(epsilon=0.15, steps=3, training_step_size=0.075),
        "target": TargetConfig(
            architecture="small_cnn",
            epochs=90,
            ema=0.99,
            optimizer=OptimizerConfig(
                name="adamw", lr=4e-3, weight_decay=5e-4, schedule="cosine", warmup_epochs=9, clip=1.0
            ),
        ),
        "training": TrainingConfig(batch_size=128, select_every=10),
        "storage": StorageConfig(checkpoint_every=200),
        "tracking": TrackingConfig(log_every=10, picture_every=10),
    }
    return run(**{**shared, **own})


def cifar10(run: type[AnyRun], **own: Any) -> AnyRun:
    """A run on CIFAR-10 with the target of the DIR paper (Section 4.1): ResNet-18 by adversarial training."""
    shared: dict[str, Any] = {
        "name": "cifar10",
        "data": DataConfig(name="cifar10", height=32, width=32, channels=3, crop_padding=4, flip=True),
        "target": TargetConfig(architecture="resnet18", epochs=110),
    }
    return run(**{**shared, **own})


def cifar10_small(run: type[AnyRun], **own: Any) -> AnyRun:
    """A run on all of CIFAR-10 that two CPU cores can do in hours: a target of 0.3 M parameters and 0.044 GMAC.

    Samples are those of PGD-3 with steps of half the radius, as on the digits. A network so small underfits before it
    overfits: the usual weight decay, a cosine to zero, a running mean of the weights.
    """
    shared: dict[str, Any] = {
        "name": "cifar10_small",
        "attack": AttackConfig(steps=3, training_step_size=4 / 255),
        "target": TargetConfig(
            architecture="wrn-10-2",
            epochs=15,
            ema=0.998,
            optimizer=OptimizerConfig(schedule="cosine", warmup_epochs=1),
        ),
        "training": TrainingConfig(select_every=3),
        "evaluation": EvaluationConfig(images=1000),
        "storage": StorageConfig(checkpoint_every=200),
    }
    return cifar10(run, **{**shared, **own})


TABLE_1 = ("natural", "pgd20", "autoattack-standard", "mifgsm20", "vnifgsm20")
"""Columns of Table 1 of the DIR paper (Zhou et al., ICML 2023), as tables name the attacks."""
NO_DEFENSE = {
    "cifar10": dict(zip(TABLE_1, (85.2, 45.72, 42.26, 47.43, 47.39), strict=True)),
    "svhn": dict(zip(TABLE_1, (91.27, 50.83, 45.16, 51.9, 51.85), strict=True)),
}
"""Its first row, percent: the bare target."""


FREE = (
    "seed",
    *(f"data.{name}" for name in ("uri", "stream", "label_column", "image_column")),
    *(f"training.{name}" for name in ("precision", "compile", "fused", "draws_ahead", "capture")),
)
"""Settings that may differ where a number of the paper stands beside the run's; those of evaluation may too."""


def changed(run: RunConfig, usual: RunConfig) -> set[str]:
    """Settings, by dotted name, that decide what the run trains and that ``usual`` has otherwise or not at all."""
    was, own = flatten(usual.identity), flatten(run.identity)
    decisive = [name for name in own if name not in FREE and not name.startswith("evaluation.")]
    return {name for name in decisive if name not in was or was[name] != own[name]}


def as_one_of(run: RunConfig, *presets: RunConfig) -> bool:
    """Whether the run trains what one of ``presets`` does: only then the paper's numbers stand beside its own."""
    return any(not changed(run, each) for each in presets)


SHORT = TrainingConfig(batch_size=16, microbatch=4, select_images=8)
"""How the stages of a smoke run are trained."""


def smoke_of(make: Callable[[], AnyRun], smaller: Callable[[AnyRun], AnyRun]) -> Callable[[], AnyRun]:
    """A preset that makes the run of ``make`` in seconds; ``smaller`` shrinks the sections of its defense."""

    def smoke() -> AnyRun:
        run = make()
        return replace(
            smaller(run),
            name=f"{run.name}_smoke",
            data=replace(run.data, limit=48 if run.data.height > 8 else 80),
            attack=replace(run.attack, steps=2),
            target=replace(run.target, epochs=2, optimizer=short_rates(run.target.optimizer)),
            training=SHORT,
            scaling=ScalingConfig(threads=1),
            evaluation=EvaluationConfig(images=16, batch_size=8, steps=2, eot=2, draws=2),
            tracking=replace(run.tracking, log_every=1, picture_every=1),
        )

    smoke.__doc__ = f"``{make.__name__}`` through every step in seconds, to see that all is there; learns nothing."
    return smoke


def with_smoke_twins(
    makers: Iterable[Callable[[], AnyRun]], smaller: Callable[[AnyRun], AnyRun]
) -> dict[str, Callable[[], RunConfig]]:
    """Presets by name, and the NAME_smoke of each."""
    plain: dict[str, Callable[[], RunConfig]] = {make.__name__: make for make in makers}
    return plain | {f"{make.__name__}_smoke": smoke_of(make, smaller) for make in makers}


def short_rates(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Rates that a few steps from random weights survive."""
    return replace(optimizer, warmup_epochs=min(optimizer.warmup_epochs, 0.5), lr=min(optimizer.lr, 1e-3))
