"""What a reproduction times, and which numbers of the paper it subtracts; every clock here is a planted one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from dircluster import cli, zoo
from dircluster.cluster.reproducing.reproduction import Asked
from dircluster.cluster.reproducing.result import Result
from dircluster.cluster.reproducing.units import Listening
from dircluster.cluster.sweeps.store import key_of
from dircluster.config import ConfigError, RunConfig, with_values
from dircluster.presets import preset
from dircluster.reproduction.cells import Outcome
from dircluster.reproduction.plan import Plan, make_plan
from dircluster.reproduction.tables import exhibits
from dircluster.training.forecast import Calibration

MODULE = "dircluster.cluster.reproducing.result"


def planned(name: str, family: str, only: tuple[str, ...] = (), **given: Any) -> Plan:
    settings = {word.replace("__", "."): value for word, value in given.items()}
    return make_plan([exhibits("cifar10")[name]], family, settings, (0,), only, key_of)


def made(plan: Plan, family: str, config: RunConfig | None = None, errors: Mapping[str, str] | None = None) -> Result:
    """The result of a plan whose trainings all ended without rows, but for ``errors`` by their names."""
    ended = {unit.key: Outcome(error=(errors or {}).get(unit.name, "")) for unit in plan.all}
    commands = {**dict.fromkeys(ended, "train"), **{exhibit.name: f"time {exhibit.name}" for exhibit in plan.exhibits}}
    return Result(plan, ended, commands, family, config or preset(family), Listening(), "there")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that are timed; HGD's cannot be."""
    asked: list[RunConfig] = []

    def calibrate(run: RunConfig, *_: Any) -> Calibration:
        asked.append(run)
        if run.defense == "hgd":
            raise RuntimeError("planted")
        return Calibration("here", {})

    monkeypatch.setattr(f"{MODULE}.local_workers", lambda scaling: nullcontext())  # which would set threads
    monkeypatch.setattr(f"{MODULE}.calibrate", calibrate)
    monkeypatch.setattr(f"{MODULE}.split_sizes", lambda *_: (100, 10, 10))
    monkeypatch.setattr(f"{MODULE}.epoch_seconds", lambda *_: 2.0)
    monkeypatch.setattr(f"{MODULE}.own_seconds", lambda run, *_: 8.0 if run.pretrain.epochs else 2.0)
    return asked


def cells(result: Result) -> dict[tuple[str, str], tuple[float | None, str]]:
    (section,) = result.sections
    there = (cell for line in section.cells for cell in line)
    return {(cell.line, cell.column): (cell.found.mean if cell.found else None, cell.error) for cell in there}


def test_a_line_that_cannot_be_timed_hides_no_other(timed: list[RunConfig]) -> None:
    found = cells(made(planned("table4", "digits", scaling__workers=2), "digits"))
    assert found["HGD", "ms an epoch"] == (None, "cannot be timed: RuntimeError: planted")
    assert found["HGD", "pgd20"] == (None, "")
    assert found["DIR", "ms an epoch"] == (2000.0, "")
    assert found["JATP, our reconstruction", "ms an epoch"] == (2000.0, "")


def test_lines_that_another_table_had_judged_longer_are_named() -> None:
    both = [exhibits("cifar10")[name] for name in ("table1", "ratio")]
    first, second = made(make_plan(both, "digits", {}, (0,), ("identity", "dir"), key_of), "digits").sections
    assert not any("Judged by suite paper" in note for note in first.exhibit.notes)
    *_, note = second.exhibit.notes
    assert note.startswith("Judged by suite paper, as another table asks for it: None; ratio 0.5; the other lines by ")
    alone = made(planned("ratio", "digits", ("identity", "dir")), "digits").sections[0].exhibit
    assert alone.notes == exhibits("cifar10")["ratio"].notes


def test_what_is_timed_is_made_again_by_timing_it(timed: list[RunConfig]) -> None:
    (section,) = made(planned("table4", "digits"), "digits").sections
    for line in section.cells:
        assert {cell.column: cell.commands for cell in line} == {
            **dict.fromkeys(("pgd20", "strongest"), ("train",)),
            "ms an epoch": ("time table4",),
        }
    assert section.commands["HGD"] == ["train"]
    assert section.commands["HGD, ms an epoch"] == ["time table4"]


def test_a_narrower_command_makes_a_part_again() -> None:
    job = cli.parse(cli.ReproduceJob, ["digits", "--what", "all", "--seeds", "3", "--evaluation.images", "9"])
    asked = Asked(job, (), (), {"evaluation.images": 9})
    assert asked.command("table2", ("hgd",), 2).split()[1:] == [
        *("jobs/reproduce.py", "table2", "digits", "--evaluation.images", "9", "--seed", "2", "--only", "hgd")
    ]
    whole = ["jobs/reproduce.py", "all", "digits", "--evaluation.images", "9", "--seeds", "3"]
    assert asked.command().split()[1:] == whole
    budgeted = Asked(replace(job, budget=30.0), (), (), asked.given)
    assert budgeted.command("table2", ("hgd",), 2).split()[1:] == [*whole, "--budget", "30"]


def test_an_epoch_is_timed_as_one_worker_does_it(timed: list[RunConfig]) -> None:
    made(planned("table4", "digits", scaling__workers=2), "digits")
    assert {run.defense for run in timed} >= {"dir", "hgd", "jatp"}
    assert {run.scaling.workers for run in timed} == {1}


def test_where_nothing_can_be_timed_the_cells_say_why(timed: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("scaling.device is gpu, but there is none")

    monkeypatch.setattr(f"{MODULE}.local_workers", refuse)
    found = cells(made(planned("table4", "digits", only=("dir",)), "digits"))
    assert found["DIR", "ms an epoch"] == (None, "cannot be timed: scaling.device is gpu, but there is none")
    assert timed == []


def test_training_time_is_in_units_of_that_with_pretraining(timed: list[RunConfig]) -> None:
    found = cells(made(planned("no-pretrain", "digits"), "digits"))
    assert found["with pre-training", "training time"] == (1.0, "")
    assert found["without, squared error added", "training time"] == (0.25, "")
    assert found["None", "training time"] == (None, "")


def test_without_its_unit_training_time_is_none(timed: list[RunConfig]) -> None:
    """The line without pre-training must not become the unit of itself."""
    plan = planned("no-pretrain", "digits")
    found = cells(made(plan, "digits", errors={"dir, seed 0": "no luck"}))
    value, error = found["without, squared error added", "training time"]
    assert value is None
    assert error.startswith("cannot be timed: there is no time of training")
    assert found["with pre-training", "training time"] == (None, "no luck")


@pytest.mark.parametrize(
    ("family", "settings", "comparable"),
    [
        ("cifar10", {}, True),
        ("svhn", {}, True),
        ("cifar10", {"evaluation.images": 100}, True),
        ("cifar10", {"attack.epsilon": 0.0157}, False),
        ("cifar10", {"attack.norm": "l2"}, False),
        ("cifar10", {"target.architecture": "wrn-10-2"}, False),
        ("cifar10", {"data.limit": 100}, False),
        ("cifar10", {"target.epochs": 90}, False),
        ("cifar10", {"dir.alpha": 0.0}, False),
        ("cifar10_small", {}, False),
        ("cifar10_smoke", {}, False),
        ("digits", {}, False),
    ],
)
def test_numbers_of_the_paper_are_of_its_data_target_and_threat(
    family: str, settings: dict[str, Any], comparable: bool
) -> None:
    config = with_values(preset(family), settings)
    plan = planned("table1", family, only=("identity",))
    result = made(plan, family, config)
    key = next(iter(plan.trainings))
    row = {"defense": "identity", "attack": "pgd20", "randomness": "none", "accuracy": 0.5, "total": 100, "eot": 1}
    row |= {"norm": config.attack.norm, "epsilon": config.attack.epsilon, "steps": 20, "step_size": 0.01}
    row |= {"restarts": 1, "average": 1, "draws": 1, "protocol": ""}
    result.outcomes[key] = replace(result.outcomes[key], rows=(row,))
    (pgd,) = (cell for cell in result.sections[0].cells[0] if cell.column == "pgd20")
    assert (pgd.difference is not None) == comparable
    assert any("not accuracies" in note for note in result.notes) != comparable


def test_the_note_says_what_is_other() -> None:
    small = made(planned("table1", "cifar10_small", only=("identity",)), "cifar10_small")
    (note,) = (note for note in small.notes if "not accuracies" in note)
    assert "Here it is cifar10, wrn-10-2, and L-infinity 0.0314 in steps of 0.0078" in note


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_leaderboard_says_of_what_schedules_it_is(factor: float) -> None:
    plan = replace(planned("ratio", "digits", only=("identity",)), factor=factor)
    result, (key,) = made(plan, "digits"), plan.trainings
    claim = json.loads((zoo.HERE / "digits-dir" / "digits-dir.json").read_text())
    result.outcomes[key] = replace(result.outcomes[key], claim=claim)
    files = result.files("Ratio", {})
    name = "identity-seed-0" if factor == 1 else "identity-seed-0 (schedules times 0.5)"
    assert f"| {name} | " in files["leaderboard.md"].decode()
    assert "claims/identity-seed-0.json" in files
