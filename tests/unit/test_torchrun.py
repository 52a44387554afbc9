"""A process group in the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dircluster import torchrun
from dircluster.cluster.commands import replay
from dircluster.config import ConfigError
from tests.jobs import ROOT, run_job

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


WORDS = {
    "reproduce": ("table1", "digits_smoke"),
    "evaluate": ("digits_smoke", "--defense", "zoo:digits-at"),
}
"""What jobs are given here; others a preset."""


def set_to(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in (*torchrun.NUMBERS, *MASTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER},
    ],
)
def test_a_group_that_can_be(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, environment)
    torchrun.check_group()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE ''; unset WORLD_SIZE, or start by torchrun"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK 'x', WORLD_SIZE '1'; unset RANK, WORLD_SIZE"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK '²'"),
        ({"RANK": "1"}, "RANK '1'; unset RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE '0'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE '0'; unset LOCAL_WORLD_SIZE"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK '2', LOCAL_WORLD_SIZE '2'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE '2' without MASTER_ADDR and MASTER_PORT and RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", **MASTER, "MASTER_PORT": "x"}, "MASTER_PORT 'x'"),
    ],
)
def test_one_that_cannot_be_is_one_line(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to(monkeypatch, environment)
    with pytest.raises(ConfigError, match=re.escape(named)) as refused:
        torchrun.check_group()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("job", ["train", "doctor", "benchmark", "reproduce"])
def test_jobs_ask_before_they_begin(job: str, tmp_path: Path) -> None:
    done = run_job(job, *WORDS.get(job, ("digits_smoke",)), folder=tmp_path, env={"WORLD_SIZE": "two"})
    assert (done.code, len(done.error)) == (2, 1)
    assert "the environment names no group of processes: WORLD_SIZE 'two'" in done.error[0]


@pytest.mark.parametrize("job", ["train", "evaluate", "tune_alpha", "doctor", "reproduce"])
def test_what_is_one_process_refuses_several(job: str, tmp_path: Path) -> None:
    several = {"RANK": "1", "WORLD_SIZE": "2", **MASTER}
    done = run_job(job, *WORDS.get(job, ("digits_smoke",)), folder=tmp_path, env=several)
    assert (done.code, len(done.error)) == (2, 1)
    assert done.error[0].endswith(": leave out torchrun, or unset WORLD_SIZE 2")


@pytest.mark.parametrize(
    ("environment", "named"),
    [({"WORLD_SIZE": "two"}, "WORLD_SIZE 'two'"), ({"RANK": "1", "WORLD_SIZE": "2", **MASTER}, "WORLD_SIZE 2")],
)
def test_a_replay_is_one_process(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_to(monkeypatch, environment)
    assert replay.main([str(ROOT / "docs" / "claims" / "digits-at.json"), "1"]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert named in said.err


@pytest.mark.parametrize(("rank", "waits"), [("0", []), ("1", [torchrun.TURN])])
def test_the_first_process_of_a_machine_tells_an_error_before_the_others(
    rank: str, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("dircluster.torchrun.time.sleep", slept.append)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **MASTER}
    done = run_job("train", "digits_smoke", "--dir.alpha", "x", folder=tmp_path, env=group)
    assert (done.code, len(done.error), slept) == (2, 1, waits)
