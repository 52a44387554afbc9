"""What a plan takes, before it is paid for, and what is timed instead of attacked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from dircluster.config import ConfigError, RunConfig, digest, named_line, to_dict, with_values
from dircluster.defenses.stage import Stage
from dircluster.distributed.parallel import Parallel
from dircluster.reproduction.plan import Plan, Training
from dircluster.training.forecast import (
    Calibration,
    Work,
    as_launched,
    calibrate,
    judging_seconds,
    seconds_of,
    stage_seconds,
    stage_work,
)
from dircluster.training.stages import stage_settings, stages_of

TIMED = 2.0
"""Seconds for which a stage is timed."""
LEAST = 0.01
"""The least that schedules are multiplied by."""
Sizes = Callable[[RunConfig], tuple[int, int, int]]
"""A run -> its training, held-out and test images."""


@dataclass(frozen=True)
class Cost:
    """What a training or a transfer adds to those before it; of several seeds where they add the same."""

    kind: str
    seeds: tuple[int, ...]
    suite: str
    trained: tuple[str, ...] = ()
    """Its stages that are to be trained."""
    stored: tuple[str, ...] = ()
    """Stages that storage holds finished."""
    shared: tuple[str, ...] = ()
    """Stages that an earlier one trains."""
    operations: float = 0.0
    """Floating-point, of training, a multiply-add counted as two; NaN where a stage cannot be counted."""
    seconds: float = 0.0
    """Of training; 0 where no pace is known, as of judging."""
    judging: float = 0.0
    """Seconds of the suite."""

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "operations": None if math.isnan(self.operations) else self.operations}


def calibrated(plan: Plan, parallel: Parallel, budget: float, launcher: str) -> dict[str, Calibration]:
    """What this machine is seen to do, by preset: ``budget`` seconds for each stage.

    Raises ConfigError where a system cannot be timed.
    """
    longest: dict[str, Training] = {}
    for training in plan.trainings.values():
        found = longest.setdefault(training.preset, training)
        if len(training.stages) > len(found.stages):
            longest[training.preset] = training
    made = dict[str, Calibration]()
    for name, training in longest.items():
        with _needed(training):
            made[name] = calibrate(as_launched(training.run, launcher), parallel, budget)
    return made


@contextmanager
def _needed(training: Training) -> Iterator[None]:
    """What a plan in minutes needs of a training: whatever its system raises becomes a ConfigError that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{training.name} cannot be foretold ({named_line(error)}): leave {training.system.name} out by --only"
        ) from error


def costs(
    plan: Plan,
    sizes: Sizes,
    launcher: str,
    known: Mapping[str, Calibration] | None = None,
    stored: Collection[str] = (),
    over: Collection[str] = (),
    *,
    judged_too: bool = True,
) -> list[Cost]:
    """What each training and transfer of the plan takes; a stage that several share, and rows of a bare target, count
    for the first.

    ``known`` are paces by preset: without them nothing is in seconds, and a stage that cannot be counted is no error:
    its training tells. With them it is a ConfigError. ``stored`` are the keys of finished stages, ``over`` those of
    what is judged already. Counting what judging takes costs seconds a system: without ``judged_too`` it is left out.
    """
    made, seen, met = list[Cost](), set[str](), dict[str, Work]()
    judged: dict[str, tuple[float, float]] = {}
    targets = set[str]()
    """Whose rows, those of the bare target, are judged by then: all defenses over it share them."""

    def judging(run: RunConfig, training: Training, target: Training, *, is_over: bool) -> float:
        """What is left to judge of ``training`` in front of the target of ``target``."""
        if known is None or not judged_too:
            return 0.0
        bare = digest([_target_key(target), to_dict(run.evaluation), run.seed])
        is_shared = bare in targets
        targets.add(bare)
        if is_over:
            return 0.0
        same = digest({**run.identity, "seed": 0})
        if same not in judged:
            train, _, test = sizes(run)
            with _needed(training):
                pace = known[training.preset]
                whole, shared = (judging_seconds(run, pace, train, test, each) for each in (False, True))
            judged[same] = whole, shared
        whole, shared = judged[same]
        return whole - shared if is_shared else whole

    def counted(training: Training, run: RunConfig, stage: Stage) -> Work:
        same = digest([stage.name, {**stage_settings(run, stage), "seed": 0}])  # seeds cost the same
        if same not in met:
            train, held_out, _ = sizes(run)
            try:
                with _needed(training):
                    met[same] = stage_work(run, stage, train, held_out)
            except ConfigError:
                if known is not None:
                    raise
                met[same] = Work(stage.name, math.nan)
        return met[same]

    for training in plan.trainings.values():
        run, operations, seconds = as_launched(training.run, launcher), 0.0, 0.0
        names: dict[str, list[str]] = {"trained": [], "stored": [], "shared": []}
        for stage in stages_of(run):
            key = training.stages[stage.name]
            if not stage.epochs:
                continue
            names["stored" if key in stored else "shared" if key in seen else "trained"].append(stage.name)
            if key in stored or key in seen:
                continue
            seen.add(key)
            work = counted(training, run, stage)
            operations += work.total
            if known is not None:
                seconds += seconds_of(work, run, stage.name, known[training.preset])
        trained, there, shared = (tuple(names[word]) for word in ("trained", "stored", "shared"))
        suite, time = run.evaluation.suite, judging(run, training, training, is_over=training.key in over)
        made.append(Cost(training.kind, (training.seed,), suite, trained, there, shared, operations, seconds, time))
    for transfer in plan.transfers.values():
        training = plan.trainings[transfer.purifier]
        run = with_values(as_launched(training.run, launcher), {"evaluation.suite": transfer.suite})
        time = judging(run, training, plan.trainings[transfer.target], is_over=transfer.key in over)
        made.append(Cost(transfer.kind, (transfer.seed,), transfer.suite, judging=time))
    return made


def _target_key(training: Training) -> str:
    """What decides the classifier that a training deploys: the key of the last stage that trains it."""
    found = [stage for stage in stages_of(training.run) if stage.epochs and "classifier" in stage.optimizers]
    return training.stages[found[-1].name] if found else training.key


def by_kind(found: Sequence[Cost]) -> list[Cost]:
    """As few: seeds that have the same to do together."""
    made: dict[tuple[object, ...], Cost] = {}
    for cost in found:
        same = (cost.kind, cost.suite, cost.trained, cost.stored, cost.shared)
        if before := made.get(same):
            made[same] = replace(
                before,
                seeds=(*before.seeds, *cost.seeds),
                operations=before.operations + cost.operations,
                seconds=before.seconds + cost.seconds,
                judging=before.judging + cost.judging,
            )
        else:
            made[same] = cost
    return list(made.values())


def factor_for(minutes: float, found: list[Cost]) -> float:
    """What all schedules are multiplied by for the trainings to take so many minutes: at most 1, of two digits.

    Raises ConfigError below LEAST, where nothing would be learned, or the machine is so busy that no timing holds.
    """
    whole = sum(cost.seconds for cost in found) / 60
    share = minutes / whole
    if share >= 1:
        return 1.0
    if share < LEAST:
        raise ConfigError(
            f"--budget {minutes:g} is too little of the {whole:,.0f} minutes that are foretold: give at least"
            f" {math.ceil(LEAST * whole)}, fewer systems (--only), or a machine that is less busy"
        )
    step = 10.0 ** (math.floor(math.log10(share)) - 1)
    return round(math.floor(share / step) * step, 12)


def epoch_seconds(run: RunConfig, found: Calibration, images: int) -> float:
    """Seconds of an epoch of the last stage at the pace that was timed, without selection on held-out images."""
    last = stages_of(run)[-1]
    return stage_seconds(run, last, found, images, 0) / last.epochs


def own_seconds(run: RunConfig, found: Calibration, images: int) -> float:
    """Seconds of all stages but the target's, without selection."""
    own = (stage for stage in stages_of(run) if stage.name != "target")
    return sum(stage_seconds(run, stage, found, images, 0) for stage in own)
