"""What a training has given is found again while its defense is the very same; a record ends as its page does."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dircluster import zoo
from dircluster.cluster.plain_store import Store
from dircluster.cluster.reproducing import units
from dircluster.cluster.reproducing.reproduction import Reproduction
from dircluster.cluster.reproducing.units import Listening
from dircluster.cluster.sweeps.store import key_of
from dircluster.config import RunConfig, with_values
from dircluster.presets import preset
from dircluster.reproduction.cells import Outcome
from dircluster.reproduction.plan import make_plan
from dircluster.reproduction.tables import exhibits
from dircluster.training import checkpoint
from tests.conftest import ALONE


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return with_values(preset("digits_smoke"), {"storage.uri": str(tmp_path)})


def commit(folder: Path, digest: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / checkpoint.COMMIT).write_text(digest)


def test_an_outcome_is_of_one_checkpoint(tmp_path: Path, run: RunConfig) -> None:
    folder, kept = tmp_path / "final", Store(tmp_path / "outcomes")
    commit(folder, "a" * 64)
    ended = Outcome(({"accuracy": 0.5},), str(folder), claim={"rows": []}, trained_by={"target": ["a", "b"]})
    units._keep(kept, "one", run, ended)
    assert units._found(kept, "one", run) == ended
    commit(folder, "b" * 64)  # trained again, by other code or for longer
    assert units._found(kept, "one", run) is None


def test_an_outcome_that_does_not_say_its_checkpoint_is_not_believed(tmp_path: Path, run: RunConfig) -> None:
    folder, kept = tmp_path / "final", Store(tmp_path / "outcomes")
    commit(folder, "a" * 64)
    kept.put("one", {"rows": [], "checkpoint": str(folder)})
    assert units._found(kept, "one", run) is None
    kept.put("two", {"rows": [], "checkpoint": str(tmp_path / "gone"), "digest": None})
    assert units._found(kept, "two", run) is None


@pytest.mark.parametrize(
    ("claim", "again"),
    [(None, True), ({"rows": [], "facts": {}}, True), ("whole", False)],
)
def test_a_claim_that_is_refused_is_made_again(
    claim: Any, again: bool, tmp_path: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = tmp_path / "final", Store(tmp_path / "outcomes")
    commit(folder, "a" * 64)
    whole = json.loads((zoo.HERE / "digits-dir" / "digits-dir.json").read_text())
    units._keep(kept, "one", run, Outcome((), str(folder), claim=whole if claim == "whole" else claim))
    monkeypatch.setattr(units, "_kept", lambda run: kept)
    monkeypatch.setattr(units, "digest", lambda what: "one" + "-" * 30)
    kept.put(("one" + "-" * 30)[:24], kept.get("one") or {})
    made: Any = object.__new__(units.Units)
    made.terminal, made._claim, made.record = Listening(), lambda run, folder: whole | {"rows": []}, None
    training: Any = SimpleNamespace(run=run, name="dir, seed 0")
    found = made._trained(training)
    assert found.claim == (whole | {"rows": []} if again else whole)
    assert kept.get(("one" + "-" * 30)[:24])["claim"] == found.claim  # type: ignore[index]
    if again:
        made._claim = lambda run, folder: 15  # a signal
        kept.put(("one" + "-" * 30)[:24], {**(kept.get("one") or {}), "claim": None})
        assert made._trained(training) == 15


def test_why_there_is_no_claim_is_said_as_other_reasons_are(tmp_path: Path, run: RunConfig) -> None:
    made: Any = object.__new__(units.Units)
    made.terminal, made.launcher = Listening(), "local"
    training: Any = SimpleNamespace(name="dir, seed 0")
    ended = made._claimed(training, run, Store(tmp_path / "outcomes"), "one", Outcome((), str(tmp_path / "gone")))
    assert ended.claim is None
    assert made.terminal.last.startswith(f"no claim of dir, seed 0: {tmp_path / 'gone'} holds no committed checkpoint")


def test_whatever_is_judged_no_verdict_is_asked(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of transfers alone: no page shows it."""
    asked: list[bool] = []

    def refuse(spec: Any, device: Any) -> None:
        asked.append(spec.config["run"]["evaluation"]["verdict"])
        raise OSError("planted")

    monkeypatch.setattr("dircluster.cluster.runtime.evaluation_job.EvaluationJob", refuse)
    monkeypatch.setattr("dircluster.distributed.launch.local_workers", lambda scaling: contextlib.nullcontext(ALONE))
    made: Any = object.__new__(units.Units)
    made.terminal, made.launcher = Listening(), "local"
    with pytest.raises(OSError, match="planted"):
        made._claim(with_values(run, {"evaluation.verdict": True}), "there")
    assert asked == [False]


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError("storage is full"), "FAILED"), (SystemExit(130), "KILLED"), (None, "FINISHED")],
)
def test_a_record_is_finished_once_the_page_is_there(
    error: BaseException | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class Done:
        def __init__(self, *_: Any) -> None:
            self.outcomes: dict[str, Any] = {}

        def run(self) -> int:
            return 0

    def tell(*_: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("dircluster.cluster.reproducing.reproduction.Units", Done)
    monkeypatch.setattr("dircluster.cluster.tracking.jobs.finish_job", lambda record, status, say: ended.append(status))
    made: Any = object.__new__(Reproduction)
    made.job, made.plan = SimpleNamespace(dry_run=False, launcher="local"), SimpleNamespace(all=[])
    made.terminal, made.tags, made.record, made.failed = SimpleNamespace(say=print), {}, object(), {}
    made.held = contextlib.ExitStack()
    made._costed, made._show, made._open_record, made._tell = list, lambda found: None, lambda: None, tell
    if error is not None:
        with pytest.raises(type(error), match=r"full|130"):
            made.run()
    else:
        assert made.run() == 0
    assert ended == [status]


def test_a_training_that_is_stopped_while_another_job_trains_has_not_failed(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Listening()

    def busy(*_: Any) -> dict[str, Any]:
        terminal.signal = 15
        return {"status": "FAILED", "error": "another job is training it", "exit": 2, "busy": True}

    monkeypatch.setattr("dircluster.cluster.runtime.local.train", busy)
    made: Any = object.__new__(units.Units)
    made.terminal, made.launcher, made.record = terminal, "local", None
    assert made._trained(SimpleNamespace(run=run, name="dir, seed 0")) == 15


def test_of_a_training_whose_claim_is_kept_nothing_is_left(tmp_path: Path) -> None:
    given = {"storage.uri": str(tmp_path)}
    plan = make_plan([exhibits("cifar10")["ratio"]], "digits_smoke", given, (0, 1), ("identity",), key_of)
    assert units.judged_trainings(plan) == set()
    first, second = plan.trainings.values()
    commit(tmp_path / "final", "a" * 64)
    for training, claim in ((first, {"rows": []}), (second, None)):  # the second's claim could not be made
        kept, name = units._kept(training.run), units._called(training.run)
        units._keep(kept, name, training.run, Outcome((), str(tmp_path / "final"), claim=claim))
    assert units.judged_trainings(plan) == {first.key}
