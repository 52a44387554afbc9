"""What jobs/reproduce.py makes of a command line, before anything begins: settings that say what is done."""

from __future__ import annotations

import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dircluster import cli
from dircluster.cluster import preflight
from dircluster.cluster.commands import reproduce
from dircluster.cluster.reproducing.reproduction import Asked, Reproduction
from dircluster.cluster.reproducing.units import Listening
from dircluster.config import ConfigError, RunConfig
from dircluster.presets import preset
from dircluster.reproduction.costs import Cost
from dircluster.reproduction.plan import Plan
from dircluster.training.forecast import Calibration, Pace

MODULE = "dircluster.cluster.reproducing.reproduction"


@pytest.mark.parametrize(
    ("words", "suite"), [(("table1",), "paper"), (("fig4",), "quick"), (("all",), "paper"), (("ratio",), "quick")]
)
def test_its_settings_name_the_suite(words: tuple[str, ...], suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main([*words, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["evaluation"]["suite"] == suite


def test_an_only_of_commas_alone_is_not_all_systems(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["table1", "digits_smoke", "--only", ",", "--print-config"]) == 2
    assert capsys.readouterr().err == "error: --only , names no system: give some, or leave it out\n"


def asked(*words: str) -> Asked:
    return reproduce.asked_of(reproduce.settled(cli.parse(cli.ReproduceJob, [*words[1:], "--what", words[0]])))


def name_of(asked: Asked) -> str:
    return Reproduction(asked, Listening()).store.folder.name


@pytest.mark.parametrize("words", [("table1", "digits_smoke"), ("table2", "digits_smoke", "--only", "hgd")])
def test_what_is_the_default_of_another_suite_is_given(words: tuple[str, ...]) -> None:
    """Quick has 20 steps, paper 20 or 40, by the attack. Of HGD in Table 2 its transfers alone are judged by paper."""
    names = [name_of(asked(*words, "--evaluation.steps", steps)) for steps in ("20", "40", "None", "20")]
    assert len({*names}) == 3
    assert names[0] == names[3]


def test_what_the_preset_has_too_is_given_to_systems_that_differ() -> None:
    """ME-Net-A crafts by 7 steps where it is not said, DIR by 5."""
    given, usual = asked("table3", "cifar10", "--attack.steps", "5"), asked("table3", "cifar10")
    found = [
        {training.system.name: training.run.attack.steps for training in each.plan(1.0).trainings.values()}
        for each in (given, usual)
    ]
    assert found[0]["menet_a"] == 5
    assert found[1]["menet_a"] == 7
    assert found[0]["dir"] == found[1]["dir"] == 5
    assert name_of(given) != name_of(usual)
    assert "--attack.steps 5" in given.command()
    assert "--attack.steps" not in usual.command()
    assert "suite" not in given.command()


def test_steps_follow_the_radius_in_each_system() -> None:
    given = asked("table1", "digits", "--attack.epsilon", "1/10")
    assert not {"attack.training_step_size", "dir.perturb_step_size"} & {*given.given}
    found = {each.system.name: each.run.attack.step for each in given.plan(1.0).trainings.values()}
    assert [found["dir"], found["jatp"]] == pytest.approx([0.05, 0.05])


def test_a_run_in_mlflow_is_of_one_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DIR's preset has the settings that are given: nothing but the plan tells the two reproductions apart."""
    begun: list[Any] = []

    def open_job(config: RunConfig, tags: Any, *, sweep: dict[str, Any]) -> SimpleNamespace:
        begun.append((config.identity, sweep))
        return SimpleNamespace(uri="sqlite:///none", run_id="1")

    monkeypatch.setattr("dircluster.cluster.tracking.jobs.open_job", open_job)
    words = ("table3", "digits", "--only", "menet_a", "--storage.uri", str(tmp_path))
    steps = str(preset("digits").attack.steps)
    for given in ((), ("--attack.steps", steps), ()):
        with Listening() as terminal:
            Reproduction(asked(*words, *given), terminal)._open_record()
    assert begun[0] == begun[2]
    assert begun[0][0] == begun[1][0]
    assert begun[0][1] != begun[1][1]


def test_a_budget_that_is_kept_tells_what_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A command that goes on times nothing again, and counts what is not trained or judged yet."""
    timed: list[str] = []

    def calibrated(plan: Plan, *_: Any) -> dict[str, Calibration]:
        timed.append("once")
        paces = {
            training.preset: dict.fromkeys((*training.stages, "evaluation"), Pace(2e9, 1, 1))
            for training in plan.trainings.values()
        }
        return {name: Calibration("a machine", pace) for name, pace in paces.items()}

    monkeypatch.setattr(f"{MODULE}.calibrated", calibrated)
    monkeypatch.setattr(f"{MODULE}.local_workers", lambda scaling: nullcontext())
    words = ("ratio", "digits_smoke", "--only", "identity", "--budget", "60", "--launcher", "local")
    asked_for = asked(*words, "--storage.uri", str(tmp_path))
    (first,) = Reproduction(asked_for, Listening())._costed()
    assert first.seconds > 0
    assert first.judging > 0
    terminal = Listening()
    made = Reproduction(asked_for, terminal)
    assert made._costed() == [first]
    assert timed == ["once"]
    assert terminal.last == "minutes are at the pace that the budget was shared out by, of a machine"

    (key,) = made.plan.trainings
    monkeypatch.setattr(made, "_stored", lambda: ({*made.plan.trainings[key].stages.values()}, {key}))
    (left,) = made._costed()
    assert (left.seconds, left.judging, left.trained) == (0.0, 0.0, ())

    made.store.put("factor", {"factor": 1.0})  # of code that kept no paces
    made._costed()
    assert timed == ["once", "once"]


def test_a_budget_that_is_judged_otherwise_trains_nothing_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Timed twice a machine has two paces, of which each would choose schedules of its own."""
    factors = iter((0.5, 0.25))
    monkeypatch.setattr(f"{MODULE}.calibrated", lambda plan, *_: {"digits_identity_smoke": Calibration("here", {})})
    monkeypatch.setattr(f"{MODULE}.local_workers", lambda scaling: nullcontext())
    monkeypatch.setattr(f"{MODULE}.factor_for", lambda minutes, found: next(factors))
    monkeypatch.setattr(f"{MODULE}.Reproduction._costs", lambda *_, **__: [])
    words = ("ratio", "digits_smoke", "--only", "identity", "--launcher", "local", "--storage.uri", str(tmp_path))
    found = []
    for more in (("--budget", "2"), ("--budget", "2", "--evaluation.images", "8"), ("--budget", "1")):
        made = Reproduction(asked(*words, *more), Listening())
        made._costed()
        found.append(made.plan.factor)
    assert found == [0.5, 0.5, 0.25]


def test_what_speaks_s3_by_itself_finds_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's artifacts, as with train, evaluate and tune."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("planted")

    for name in ("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("dircluster.cluster.preflight.check", refuse)
    words = ["table1", "digits_smoke", "--only", "identity", "--storage.endpoint", "http://127.0.0.1:9"]
    assert reproduce.main(words) == 2
    assert os.environ["AWS_ENDPOINT_URL_S3"] == os.environ["MLFLOW_S3_ENDPOINT_URL"] == "http://127.0.0.1:9"


def test_a_dry_run_writes_its_plan_and_fetches_no_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where stages of other data lie in storage either."""
    (tmp_path / "runs" / "target-0123" / "final").mkdir(parents=True)
    monkeypatch.setitem(preflight.DOWNLOADS, "cifar10", ("cifar-10-batches-py", "http://127.0.0.1:9/none"))
    monkeypatch.setattr(f"{MODULE}.calibrated", lambda plan, *_: {})
    planned = Cost("identity", (0,), "paper", ("target",), operations=math.nan)
    monkeypatch.setattr(f"{MODULE}.Reproduction._costs", lambda *_, **__: [planned])
    summary, storage = tmp_path / "plan.json", tmp_path / "runs"
    words = ["table1", "cifar10", "--only", "identity", "--dry-run", "--launcher", "local", "--summary", str(summary)]
    assert reproduce.main([*words, "--storage.uri", str(storage)]) == 0
    assert "it goes by the images of cifar10, not fetched yet" in capsys.readouterr().out
    assert [file.name for file in storage.iterdir()] == ["target-0123"]
    (row,) = json.loads(summary.read_text())["plan"]
    assert (row["kind"], row["seeds"], row["trained"], row["operations"]) == ("identity", [0], ["target"], None)
