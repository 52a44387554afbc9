"""The cheapest set of trainings that covers what is asked: cells whose stages are equal, key by key, share one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dircluster.config import ConfigError, RunConfig, digest, flatten, short, to_dict, varied, with_values
from dircluster.presets import PRESETS, preset
from dircluster.reproduction.exhibits import ONE_WORKER, Exhibit, Line, Settings, System
from dircluster.training.costs import step_operations
from dircluster.training.stages import stages_of

KeyOf = Callable[[RunConfig, str], str]
"""A run, and the name of one of its stages -> what decides what the stages up to that one end in."""


@dataclass(frozen=True)
class Training:
    """One run that is trained and judged, for all cells that it serves."""

    key: str
    system: System
    seed: int
    preset: str
    run: RunConfig
    stages: Mapping[str, str]
    """The key of each stage."""

    @property
    def kind(self) -> str:
        """What its seeds have in common: ``dir, alpha 2``."""
        words = [f"{name.rpartition('.')[2]} {short(value)}" for name, value in self.system.settings.items()]
        return ", ".join([self.system.name, *words])

    @property
    def name(self) -> str:
        """``dir, alpha 2, seed 0``."""
        return f"{self.kind}, seed {self.seed}"


@dataclass(frozen=True)
class Transfer:
    """A purifier that is judged in front of another target than it was trained for: nothing is trained."""

    key: str
    system: System
    seed: int
    purifier: str
    """Key of the training that it comes from."""
    target: str
    """Key of the training whose classifier it is put in front of."""
    suite: str

    @property
    def kind(self) -> str:
        """``dir onto trades``."""
        return f"{self.system.name} onto {self.system.onto}"

    @property
    def name(self) -> str:
        """``dir onto trades, seed 0``."""
        return f"{self.kind}, seed {self.seed}"


Unit = Training | Transfer


@dataclass(frozen=True)
class Plan:
    """What is trained and judged, and what serves which cell."""

    exhibits: tuple[Exhibit, ...]
    """With the lines that are asked for."""
    trainings: Mapping[str, Training]
    """By key, in the order in which they are trained."""
    transfers: Mapping[str, Transfer]
    served: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    """Keys by exhibit and label of a line, one a seed."""
    factor: float = 1.0
    """Of all schedules."""

    @property
    def all(self) -> list[Unit]:
        """Trainings, then transfers, in the order in which they are done."""
        return [*self.trainings.values(), *self.transfers.values()]

    def units(self, exhibit: Exhibit, line: Line) -> list[Unit]:
        """What serves a line, one a seed."""
        return [self.trainings.get(key) or self.transfers[key] for key in self.served[exhibit.name, line.label]]

    def run_of(self, unit: Unit) -> RunConfig:
        """The run that a unit is judged as: a transfer's is its purifier's, with the suite and target of its own."""
        if isinstance(unit, Training):
            return unit.run
        own = {"evaluation.suite": unit.suite, "target.objective": unit.system.onto}
        return with_values(self.trainings[unit.purifier].run, own)


def make_plan(
    exhibits: Iterable[Exhibit],
    family: str,
    given: Settings,
    seeds: Sequence[int],
    only: Collection[str],
    key_of: KeyOf,
    factor: float = 1.0,
) -> Plan:
    """The plan for ``exhibits`` over the presets of ``family``, with settings ``given`` to all systems.

    ``only`` names systems, all where it is empty. What one worker trains has one, whatever is given. Raises ConfigError
    where a system cannot have a setting, or where nothing is left of an exhibit.
    """
    kept = tuple(_of(exhibit, only) for exhibit in exhibits)
    made: dict[str, Unit] = {}
    suites: dict[str, set[str]] = {}
    served: dict[tuple[str, str], tuple[str, ...]] = {}

    met: dict[str, str] = {}

    def trained(system: System, seed: int, suite: str) -> str:
        name, settings = preset_of(family, system.name), {**given, **system.settings, "seed": seed}
        if system.name in ONE_WORKER:
            settings["scaling.workers"] = 1
        called = digest([name, settings])
        if called not in met:  # keys take a while to make
            if name not in PRESETS:
                raise ConfigError(f"there is no preset {name}: leave {system.name} out by --only")
            run = with_settings(preset(name), settings)
            if system.name == "finetune":
                run = at_equal_cost(run, preset(name).target.objective)
            run = shortened(run, factor)
            stages = {stage.name: key_of(run, stage.name) for stage in stages_of(run)}
            met[called] = key = list(stages.values())[-1]
            made.setdefault(key, Training(key, system, seed, name, run, stages))
        suites.setdefault(met[called], set()).add(suite)
        return met[called]

    def judged(system: System, seed: int, suite: str) -> str:
        if not system.onto:
            return trained(system, seed, suite)
        purifier = trained(System(system.name, system.settings), seed, "quick")
        target = trained(System("identity", {"target.objective": system.onto}), seed, "quick")
        key = digest([purifier, target])
        made.setdefault(key, Transfer(key, system, seed, purifier, target, suite))
        return key

    for exhibit in kept:
        for line in exhibit.lines:
            keys = tuple(judged(line.system, seed, exhibit.suite) for seed in seeds)
            served[exhibit.name, line.label] = keys
    trainings = {k: _judged_by(unit, suites[k]) for k, unit in made.items() if isinstance(unit, Training)}
    transfers = {k: unit for k, unit in made.items() if isinstance(unit, Transfer)}
    return Plan(kept, trainings, transfers, served, factor)


def preset_of(family: str, system: str) -> str:
    """The preset of a system: (digits_smoke, hgd) -> digits_hgd_smoke."""
    base, smoke, _ = family.partition("_smoke")
    return family if system == "dir" else f"{base}_{system}{smoke}"


def with_settings(run: RunConfig, settings: Settings) -> RunConfig:
    """``run`` with settings that it must have. Raises ConfigError."""
    known = flatten(to_dict(run))
    for name in settings:
        if name not in known:
            raise ConfigError(f"{name} is no setting of {run.defense}: give what all systems share, or --only")
    return varied(run, settings)


def at_equal_cost(run: RunConfig, objective: str) -> RunConfig:
    """``run``, a target that is trained on, with as many epochs as cost what its own do with targets by ``objective``.

    A denoiser beside it costs the same over any target; a step of natural training costs a part of one of AT.
    """
    if run.target.objective == objective:
        return run
    first = with_values(run, {"seed": 0})  # seeds cost the same, and are counted once
    usual = step_operations(with_values(first, {"target.objective": objective}), "finetune")
    epochs = flatten(to_dict(run))["finetune.epochs"] * usual / step_operations(first, "finetune")
    return with_values(run, {"finetune.epochs": max(1, round(epochs))})


def shortened(run: RunConfig, factor: float) -> RunConfig:
    """``run`` with ``factor`` times the epochs of every stage, and of what its schedules count in epochs."""
    if factor == 1:
        return run
    changed: dict[str, Any] = {}
    for name, value in flatten(to_dict(run)).items():
        word = name.rpartition(".")[2]
        if word == "warmup_epochs":
            changed[name] = factor * value
        elif word == "milestones":
            changed[name] = tuple(max(1, round(factor * epoch)) for epoch in value)
        elif word.endswith("epochs") or word == "select_every":
            changed[name] = max(1, round(factor * value)) if value else 0
    return with_values(run, changed)


def _of(exhibit: Exhibit, only: Collection[str]) -> Exhibit:
    lines = tuple(line for line in exhibit.lines if not only or line.system.name in only)
    if not lines:
        there = ", ".join(dict.fromkeys(line.system.name for line in exhibit.lines))
        raise ConfigError(f"--only {','.join(only)} leaves nothing of {exhibit.name}, which has {there}")
    return dataclasses.replace(exhibit, lines=lines)


def _judged_by(training: Training, suites: Collection[str]) -> Training:
    suite = "paper" if "paper" in suites else "quick"
    return dataclasses.replace(training, run=with_values(training.run, {"evaluation.suite": suite}))
