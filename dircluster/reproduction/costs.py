"""What a plan takes, told before it is paid for, and what is timed instead of attacked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dircluster.config import ConfigError, RunConfig
from dircluster.distributed.parallel import Parallel
from dircluster.reproduction.plan import Plan, Training
from dircluster.training.costs import step_operations
from dircluster.training.forecast import EVALUATION, Calibration, calibrate, forecast
from dircluster.training.stages import stages_of

TIMED = 0.5
"""Seconds for which a stage, or a gradient of the evaluation, is timed."""
Sizes = Callable[[RunConfig], tuple[int, int, int]]
"""A run -> its training, held-out and test images."""


@dataclass(frozen=True)
class Cost:
    """What a training or a transfer adds to those before it, in seconds."""

    name: str
    training: float
    judging: float
    shared: tuple[str, ...] = ()
    """Stages that an earlier one trains."""


def calibrated(plan: Plan, parallel: Parallel, budget: float) -> dict[str, Calibration]:
    """What this machine is seen to do, by preset: ``budget`` seconds for each stage and each evaluation."""
    longest: dict[str, Training] = {}
    for training in plan.trainings.values():
        found = longest.setdefault(training.preset, training)
        if len(training.stages) > len(found.stages):
            longest[training.preset] = training
    return {name: calibrate(training.run, parallel, budget) for name, training in longest.items()}


def costs(plan: Plan, known: Mapping[str, Calibration], sizes: Sizes) -> list[Cost]:
    """What each training and transfer of the plan takes; a stage that several share counts for the first."""
    made, seen = list[Cost](), set[str]()
    judging: dict[str, float] = {}
    for training in plan.trainings.values():
        foretold = forecast(training.run, known[training.preset], *sizes(training.run))
        seconds = {one.name: one.seconds for one in foretold}
        judging[training.key] = seconds.pop(EVALUATION)
        shared = tuple(name for name, key in training.stages.items() if key in seen)
        own = sum(second for name, second in seconds.items() if name not in shared)
        seen |= set(training.stages.values())
        made.append(Cost(training.name, own, judging[training.key], shared))
    return [*made, *(Cost(each.name, 0.0, judging[each.purifier]) for each in plan.transfers.values())]


def factor_for(minutes: float, found: list[Cost]) -> float:
    """What all schedules are multiplied by for the trainings to take so many minutes: at most 1, of two digits."""
    whole = sum(cost.training for cost in found) / 60
    share = minutes / whole
    if share >= 1:
        return 1.0
    step = 10.0 ** (math.floor(math.log10(share)) - 1)
    return round(math.floor(share / step) * step, 12)


def epoch_seconds(run: RunConfig, found: Calibration, images: int) -> float:
    """Seconds of one epoch of the last stage at the pace that was timed, on one worker."""
    last = stages_of(run)[-1]
    return step_operations(run, last.name) * (images // run.training.batch_size) / _pace(found, last.name)


def training_seconds(run: RunConfig, found: Calibration, images: int) -> float:
    """Seconds of all epochs of all stages but the target's."""
    steps = images // run.training.batch_size
    return sum(
        stage.epochs * steps * step_operations(run, stage.name) / _pace(found, stage.name)
        for stage in stages_of(run)
        if stage.name != "target"
    )


def _pace(found: Calibration, stage: str) -> float:
    if stage not in found.paces:
        raise ConfigError(f"stage {stage} was not timed")
    return found.paces[stage].operations_per_second
