"""The process that the person started, on its way into a Ray cluster, through a run there, and out again."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ray

from dircluster.cluster import storage
from dircluster.cluster.runtime import nodes
from dircluster.config import ConfigError, RunConfig, first_line
from dircluster.cores import cores

if TYPE_CHECKING:
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.runtime.ray_train import Job
    from dircluster.cluster.tracking.jobs import JobRecord

OWN_CLUSTER = {
    "RAY_worker_maximum_startup_concurrency": "16",  # Ray Train has many small helpers; as many as CPUs is the default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that asks whether this machine is being taken away
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # until the end of the workers is noticed
}
"""What Ray is told where it starts a cluster on this machine, unless the environment says otherwise."""


def _leave() -> None:
    """Spare the interpreter its last search for cycles among all modules of MLflow, torch and Ray: two seconds."""
    if "triton" not in sys.modules:  # its bindings complain of what is not collected
        gc.freeze()


atexit.register(_leave)


def train(
    config: RunConfig,
    owner: str,
    fresh: bool,
    record: Callable[[], JobRecord | None],
    terminal: Terminal,
    on_outcome: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run on ``scaling.workers`` Ray Train workers: -> the outcome, with ``status`` FINISHED, FAILED or KILLED.

    ``record`` is called while the workers start, ``on_outcome`` with the outcome while the cluster still ends.
    Raises ConfigError where the cluster is too small or runs another version of this code, and what ``record`` raises.
    """
    job: Job | None = None
    try:
        join_cluster(config, terminal)
        if signal := terminal.stop_signal():
            return {"status": "KILLED", "signal": signal}
        from dircluster.cluster.runtime.ray_train import Job  # it imports Ray Train, for seconds

        job = Job(config, owner, fresh, terminal, alone=not os.environ.get("RAY_ADDRESS"))
        return job.follow(record, on_outcome)
    except ray.exceptions.RayError as error:
        reason = first_line(error)
        return {"status": "FAILED", "error": f"the cluster is gone ({reason}); the same command resumes", "exit": 1}
    finally:
        ray.shutdown()
        if job is not None:
            job.fitting.join(15)  # a thread inside Ray must not outlive it
        forget(config, owner)


def join_cluster(config: RunConfig, terminal: Terminal) -> None:
    """Join or start a cluster that is large enough and runs this version. Raises ConfigError where there is none.

    After a signal it returns without looking whether the cluster is large enough: the caller asks the terminal.
    """
    _start_ray(config)
    terminal.listen()
    nodes.must_suffice(config.scaling, terminal)
    if not terminal.stop_signal() and os.environ.get("RAY_ADDRESS"):
        nodes.must_run_this_version()


def _start_ray(config: RunConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine. Raises ConfigError."""
    address, here = os.environ.get("RAY_ADDRESS"), cores()
    own: dict[str, Any] = {
        "address": "local",
        "num_cpus": here if config.scaling.device == "gpu" else max(here, config.scaling.least),
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
    }
    if not address:
        for name, value in OWN_CLUSTER.items():
            os.environ.setdefault(name, value)
    try:
        with _children_do_not_hear(signal.SIGHUP):
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **({} if address else own))
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        what = f"no Ray cluster answers at RAY_ADDRESS {address}" if address else "Ray cannot start on this machine"
        raise ConfigError(f"{what}: {first_line(error)}") from error


@contextlib.contextmanager
def _children_do_not_hear(number: int) -> Iterator[None]:
    """Processes that are started meanwhile inherit that a signal is held back: a closed terminal sends it to all, and
    workers must live until they have stored a checkpoint. This process hears it afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def forget(config: RunConfig, owner: str) -> None:
    """Remove what Ray noted of this job in storage, as far as that goes: runs resume from their own checkpoints."""
    import shutil
    from pathlib import Path

    with contextlib.suppress(Exception):
        folder = storage.open_path(config.storage.uri, config.storage) / "ray" / owner
        if isinstance(folder, Path):
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.rmdir()
        else:
            folder.fs.rm(folder.path, recursive=True)
