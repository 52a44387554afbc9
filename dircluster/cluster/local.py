"""The same run without Ray: in this process, or as one of the processes that torchrun started."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from dircluster.cluster.console import Terminal
from dircluster.config import ConfigError, RunConfig
from dircluster.training.loop import NonFiniteLoss
from dircluster.training.parallel import local_workers
from dircluster.training.pipeline import Run
from dircluster.training.ports import Interrupted, NoTracker, Tracker


def is_first() -> bool:
    """Whether this process is the one that talks."""
    return os.environ.get("RANK", "0") == "0"


def has_mlflow() -> bool:
    """Whether MLflow is installed; without it a local run keeps no record."""
    return importlib.util.find_spec("mlflow") is not None


def train(config: RunConfig, token: str | None, job: Any, terminal: Terminal) -> dict[str, Any]:
    """Run here: -> the outcome, with ``status`` FINISHED, FAILED or KILLED."""
    tracker: Tracker = NoTracker()
    close = None
    if job is not None:
        from dircluster.cluster.mlflow_tracker import MlflowTracker

        tracker = recorder = MlflowTracker(job, terminal.say)
        close = recorder.close
    outcome: Mapping[str, Any]
    try:
        with local_workers(config.scaling) as parallel:
            outcome = {"status": "FINISHED", **Run(config, parallel, tracker, terminal, token=token).execute()}
    except Interrupted as stop:
        outcome = {"status": "KILLED", "signal": stop.signal}
    except (ConfigError, NonFiniteLoss) as error:
        outcome = {"status": "FAILED", "error": str(error), "exit": 2 if isinstance(error, ConfigError) else 1}
    finally:
        if close is not None:
            close()
    return dict(outcome)
