"""What a job leaves behind at its end where a part of that cannot be written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dircluster import cli
from dircluster.cluster.commands import evaluate, reproduce
from dircluster.cluster.commands.train import Launch
from dircluster.cluster.reproducing.reproduction import Reproduction
from dircluster.cluster.tracking import jobs, registry
from dircluster.config import ConfigError, with_values
from dircluster.evaluation import export, html_report
from dircluster.presets import preset


class Terminal:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)

    def table(self, rows: Any) -> None: ...


def full(*_: Any) -> Any:
    raise ConfigError("--export cannot be written: No space left on device")


def test_a_training_whose_export_fails_has_told_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "_export", full)
    words = ["digits_smoke", "--storage.uri", str(tmp_path), "--summary", str(tmp_path / "s.json"), "--export", "hub"]
    launch, terminal = Launch(cli.parse(cli.TrainJob, words)), Terminal()
    launch.foretold = None
    with pytest.raises(ConfigError, match="No space left"):
        launch._tell({"status": "FINISHED", "results": [], "checkpoint": "dir-0/final"}, terminal)
    assert json.loads((tmp_path / "s.json").read_text())["checkpoint"] == "dir-0/final"
    assert [line.split()[0] for line in terminal.said] == ["defense", "judge", "took"]


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        ({"status": "KILLED", "signal": 15}, 143, ""),
        ({"status": "FAILED", "error": "the loss is not finite", "exit": 1}, 1, "error: the loss is not finite\n"),
    ],
)
def test_why_a_run_ended_is_told_where_its_summary_cannot_be_written(
    outcome: dict[str, Any],
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Launch, "_train", lambda *_: outcome)
    words = ["digits_smoke", "--storage.uri", str(tmp_path), "--summary", "/dev/full", "--launcher", "local"]
    assert Launch(cli.parse(cli.TrainJob, words)).run() == code
    said = capsys.readouterr()
    assert "--summary /dev/full cannot be written: No space left on device" in said.out
    assert said.err == line


@pytest.mark.parametrize(("busy", "ends"), [(True, ["left"]), (False, ["FAILED"])])
def test_the_record_of_another_job_stays_its_own(
    busy: bool, ends: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    monkeypatch.setattr(jobs, "finish_job", lambda record, status, say: ended.append(status))
    monkeypatch.setattr(jobs, "hand_back", lambda record: ended.append("left"))
    outcome = {"status": "FAILED", "error": "another job is training it", "exit": 2, "busy": busy}
    monkeypatch.setattr(Launch, "_train", lambda *_: outcome)
    launch = Launch(cli.parse(cli.TrainJob, ["digits_smoke", "--storage.uri", str(tmp_path), "--launcher", "local"]))
    launch.record = SimpleNamespace(uri="http://server", run_id="1")
    assert launch.run() == 2
    assert ended == ends


def test_a_run_that_is_asked_twice_to_stop_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []

    def leave(*_: Any) -> dict[str, Any]:
        raise SystemExit(130)

    monkeypatch.setattr(jobs, "finish_job", lambda record, status, say: ended.append(status))
    monkeypatch.setattr(Launch, "_train", leave)
    launch = Launch(cli.parse(cli.TrainJob, ["digits_smoke", "--storage.uri", str(tmp_path), "--launcher", "local"]))
    launch.record = SimpleNamespace(uri="http://server", run_id="1")
    with pytest.raises(SystemExit):
        launch.run()
    assert ended == ["KILLED"]


def test_an_evaluation_whose_export_fails_has_told_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html_report, "write_report", lambda *_: [])
    monkeypatch.setattr(export, "exported", lambda *_: {})
    monkeypatch.setattr(export, "write_export", full)
    words = ["digits", "--tracking.no-enabled", "--summary", str(tmp_path / "s.json"), "--export", "out.pt"]
    job, terminal = cli.parse(cli.EvaluateJob, words), Terminal()
    found: Any = SimpleNamespace(rows=[], notes=[], verdict=[], to_plain=lambda: {"suite": "quick"})
    made: Any = SimpleNamespace(
        report=lambda: found, report_facts=lambda *_: {}, claim=lambda *_: {}, facts={"defense": ""}, rows=[]
    )
    made.victim = made.test = made.folder = None
    with pytest.raises(ConfigError, match="No space left"):
        evaluate._Judging(job, job.run, terminal, True, None)._tell(made)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "s.json").read_text())["suite"] == "quick"


def test_a_summary_does_not_take_the_place_of_an_exports_claim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["digits", "--defense", "zoo:digits-at", "--export", f"{tmp_path}/out.pt", "--summary"]
    assert evaluate.main([*words, f"{tmp_path}/out.json"]) == 2
    assert "out.json is where --export writes its claim: give it another name" in capsys.readouterr().err


def no_room(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("main", "words", "target", "what"),
    [
        (evaluate.main, "digits --defense zoo:digits-at --launcher local", (evaluate._Judging, "run"), "evaluation"),
        (reproduce.main, "table3 digits_smoke --launcher local", (Reproduction, "run"), "reproduction"),
    ],
)
def test_a_disk_that_is_full_by_then_is_one_line(
    main: Callable[[list[str]], int],
    words: str,
    target: tuple[Any, str],
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(*target, no_room)
    assert main([*words.split(), "--storage.uri", str(tmp_path)]) == 1
    line = f"error: the {what} stopped (OSError: [Errno 28] No space left on device); the same command goes on\n"
    assert capsys.readouterr().err == line


def test_a_registered_target_that_there_is_no_room_for_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "fetch", lambda *_: tmp_path)
    monkeypatch.setattr(registry, "copy", no_room)
    run = with_values(preset("digits_smoke"), {"storage.uri": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"^models:/dir-x@champion cannot be kept in storage.uri .*No space left"):
        registry.reachable("models:/dir-x@champion", run)
