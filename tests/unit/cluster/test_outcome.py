"""How runs end, as plain data: what a restart cannot mend is an outcome, the rest goes to Ray."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dircluster.cluster.outcome import outcome_of
from dircluster.config import ConfigError
from dircluster.training.interrupt import Interrupted
from dircluster.training.locks import TakenOverError
from dircluster.training.step import NonFiniteLoss


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Interrupted(15), {"status": "KILLED", "signal": 15}),
        (ConfigError("no"), {"status": "FAILED", "error": "no", "exit": 2, "busy": False}),
        (TakenOverError("held"), {"status": "FAILED", "error": "held", "exit": 2, "busy": True}),
        (NonFiniteLoss("dir: loss"), {"status": "FAILED", "error": "dir: loss", "exit": 1}),
    ],
)
def test_what_a_restart_would_only_repeat(error: Exception, outcome: dict[str, Any]) -> None:
    def execute() -> dict[str, Any]:
        raise error

    assert outcome_of(execute) == outcome
    assert json.loads(json.dumps(outcome)) == outcome


def test_a_finished_run() -> None:
    assert outcome_of(lambda: {"checkpoint": "final"}) == {"status": "FINISHED", "checkpoint": "final"}


@pytest.mark.parametrize("error", [OSError("storage"), RuntimeError("another worker is gone"), KeyboardInterrupt()])
def test_what_a_restart_may_mend_passes_through(error: BaseException) -> None:
    def execute() -> dict[str, Any]:
        raise error

    with pytest.raises(type(error)):
        outcome_of(execute)
