"""The same run without Ray: in this process, or as one of the processes that torchrun started."""

from __future__ import annotations

import importlib.util
from typing import Any

from dircluster.cluster.console import Terminal
from dircluster.cluster.outcome import outcome_of
from dircluster.cluster.storage import opener, troubles
from dircluster.cluster.version import commit
from dircluster.config import RunConfig, StoppedError, named_line
from dircluster.distributed.launch import local_workers, most_wait
from dircluster.training.protocols import NoTracker, Tracker
from dircluster.training.run import Run


def has_mlflow() -> bool:
    """Whether MLflow is installed; without it a local run keeps no record."""
    return importlib.util.find_spec("mlflow") is not None


def train(config: RunConfig, owner: str, fresh: bool, job: Any, terminal: Terminal) -> dict[str, Any]:
    """Run here: -> the outcome, with ``status`` FINISHED, FAILED or KILLED."""
    tracker: Tracker = NoTracker()
    recorder = None
    if job is not None:
        from dircluster.cluster.tracking.tracker import MlflowTracker

        tracker = recorder = MlflowTracker(job, terminal.say)

    def execute() -> dict[str, Any]:
        with local_workers(config.scaling, timeout=most_wait(config)) as parallel:
            open_path = opener(config.storage)
            run = Run(
                config, parallel, tracker, terminal, owner=owner, fresh=fresh, version=commit(), open_path=open_path
            )
            try:
                return run.execute()
            except troubles() as error:
                raise StoppedError.of("training", named_line(error)) from error

    outcome = outcome_of(execute)
    if recorder is not None:
        recorder.close(hurry=outcome["status"] == "KILLED")
    return outcome
