"""What each Ray Train worker does: the same run as everywhere, shown through the channel."""

from __future__ import annotations

import os
import time
from typing import Any

import ray

from dircluster.cluster.outcome import outcome_of
from dircluster.cluster.runtime.channel import LAST_WORD, TAKEN_AWAY, RemoteConsole
from dircluster.cluster.storage import opener, to_environment
from dircluster.cluster.version import commit
from dircluster.config import RunConfig
from dircluster.distributed.launch import local_workers, most_wait
from dircluster.presets import run_from_plain
from dircluster.training.interrupt import waiting
from dircluster.training.protocols import Console, NoTracker, Quiet, Tracker
from dircluster.training.run import Run


def work(config: dict[str, Any], owner: str, fresh: bool, until: str, channel: Any) -> None:
    """Run on this worker; the first one hands the outcome to the channel.

    Errors that a restart would only repeat are outcomes too: Ray restarts workers after all others.
    """
    run_config: RunConfig = run_from_plain(config)
    to_environment(run_config.storage)
    timeout = max(60.0, 2 * run_config.scaling.stall, most_wait(run_config))
    with local_workers(run_config.scaling, timeout=timeout) as parallel:
        node = ray.get_runtime_context().get_node_id()
        ray.get(channel.enter.remote(parallel.rank, parallel.world, node, os.getpid()))
        console: Console = Quiet()
        tracker: Tracker = NoTracker()
        recorder = None
        remote = RemoteConsole(channel, run_config.name, _is_taken_away) if parallel.first else None
        if remote is not None:
            console = remote
            record = _record(channel)
            if record is not None:
                from dircluster.cluster.tracking.jobs import JobRecord
                from dircluster.cluster.tracking.tracker import MlflowTracker  # the others go without

                tracker = recorder = MlflowTracker(JobRecord(**record), remote.say)
        run = Run(
            run_config,
            parallel,
            tracker,
            console,
            owner=owner,
            fresh=fresh,
            until=until,
            version=commit(),
            open_path=opener(run_config.storage),
        )
        outcome = outcome_of(run.execute)
        if recorder is not None:
            with waiting(console):
                recorder.close(hurry=outcome["status"] != "FINISHED")
        if outcome.get("signal") == TAKEN_AWAY:
            if remote is not None:
                remote.leave()
        elif remote is not None:
            remote.finish(outcome)
        elif outcome["status"] == "FAILED":
            deadline = time.monotonic() + 2 * LAST_WORD  # Ray would start all again as soon as one ends
            while not ray.get(channel.fail.remote(outcome)) and time.monotonic() < deadline:
                time.sleep(1.0)


def _is_taken_away() -> bool:
    """Whether Ray has announced that a node of this run is about to be taken away.

    ``ray.train.get_preemption_info`` is a barrier between the workers: here the first one asks alone, and all stop as
    it does.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def _record(channel: Any) -> dict[str, Any] | None:
    """The run in MLflow, which the driver opens meanwhile."""
    while (opened := ray.get(channel.opened.remote())) is None:
        time.sleep(0.1)
    found: dict[str, Any] | None = opened[0]
    return found
