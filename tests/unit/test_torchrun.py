"""A process group in the environment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dircluster import torchrun
from dircluster.config import ConfigError
from tests.jobs import run_job

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def told(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
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
    told(monkeypatch, environment)
    torchrun.check_group()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE ''; unset WORLD_SIZE, or start by torchrun"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK 'x', WORLD_SIZE '1'; unset RANK, WORLD_SIZE"),
        ({"LOCAL_RANK": "²"}, "LOCAL_RANK '²'"),
        ({"RANK": "1"}, "RANK '1'; unset RANK"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE '0'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE '2' without MASTER_ADDR and MASTER_PORT and RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", **MASTER, "MASTER_PORT": "x"}, "MASTER_PORT 'x'"),
    ],
)
def test_one_that_cannot_be_is_one_line(
    environment: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, environment)
    with pytest.raises(ConfigError, match=re.escape(named)) as refused:
        torchrun.check_group()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("job", ["train", "doctor", "benchmark", "reproduce"])
def test_jobs_ask_before_they_begin(job: str, tmp_path: Path) -> None:
    words = ("table1", "digits_smoke") if job == "reproduce" else ("digits_smoke",)
    done = run_job(job, *words, folder=tmp_path, env={"WORLD_SIZE": "two"})
    assert (done.code, len(done.error)) == (2, 1)
    assert "the environment names no group of processes: WORLD_SIZE 'two'" in done.error[0]
