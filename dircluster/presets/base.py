"""What presets share: a small form of a run, to see that all is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from dircluster.config import EvaluationConfig, OptimizerConfig, RunConfig, ScalingConfig, TrainingConfig

AnyRun = TypeVar("AnyRun", bound=RunConfig)


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
            training=TrainingConfig(batch_size=16, microbatch=4, select_images=8),
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
