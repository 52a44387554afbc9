"""How a run ended, as plain data that can travel between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dircluster.config import ConfigError, first_line, named_line
from dircluster.training.interrupt import Interrupted
from dircluster.training.locks import TakenOverError
from dircluster.training.step import NonFiniteLoss


def outcome_of(execute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``execute`` returned with ``status`` FINISHED; KILLED and the signal; or FAILED, the line and exit code,
    and whether it is ``busy``: another job trains a stage just now.

    Any other exception passes through: a restart may help against it.
    """
    try:
        return {"status": "FINISHED", **execute()}
    except Interrupted as stop:
        return {"status": "KILLED", "signal": stop.signal}
    except ConfigError as error:
        busy = isinstance(error, TakenOverError)
        return {"status": "FAILED", "error": str(error), "exit": error.exit_code, "busy": busy}
    except NonFiniteLoss as error:
        return {"status": "FAILED", "error": str(error), "exit": 1}


def reason_of(error: Exception) -> str:
    """Why a part of a job failed, in a line that needs no name where the error is one that people are to read."""
    return first_line(error) if isinstance(error, ConfigError) else named_line(error)
