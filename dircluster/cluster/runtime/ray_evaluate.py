"""An evaluation on Ray workers: actors take shard after shard; what they finish lies in storage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData

from dircluster.cluster.console import Terminal
from dircluster.cluster.loading import JobSpec
from dircluster.cluster.runtime.driver import join_cluster
from dircluster.cluster.runtime.evaluation_job import EvaluationJob
from dircluster.config import ConfigError, RunConfig, StoppedError, error_from_plain, error_to_plain, first_line

RETRIES = 4
"""Times that a worker which died is started again, and its shard with it."""
PATIENCE = 30.0
"""Seconds in which no worker works after which the person is shown."""


class _Worker:
    """One actor and its evaluation job."""

    def __init__(self, job_spec: dict[str, Any], on_gpu: bool, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.job_spec, self.device = JobSpec(**job_spec), torch.device("cuda" if on_gpu else "cpu")
        self.evaluation_job: EvaluationJob | None = None

    def ready(self) -> None:
        """Answered once the actor has a place in the cluster."""

    def work(self, index: int) -> dict[str, Any] | None:
        """Do one shard; -> None, or as plain data why it cannot be done."""
        try:
            if self.evaluation_job is None:
                self.evaluation_job = EvaluationJob(self.job_spec, self.device)
            self.evaluation_job.work(index)
        except ConfigError as error:
            return error_to_plain(error)
        return None


def work(
    job_spec: JobSpec,
    config: RunConfig,
    workers: int | None,
    indices: list[int],
    terminal: Terminal,
    on_done: Callable[[int], None],
) -> int:
    """Do the shards at ``indices`` on ``workers`` actors, or as many as there are CPUs or GPUs; -> the signal, or 0.

    ``on_done`` is called with the index of each shard that is finished. Raises ConfigError where the cluster cannot do
    it.
    """
    try:
        join_cluster(config, terminal)
        if signal := terminal.stop_signal():
            return signal
        gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        on_gpu = config.scaling.device == "gpu" or (config.scaling.device == "auto" and gpus > 0)
        there = gpus if on_gpu else cpus
        if workers is not None and config.scaling.least > there:
            raise ConfigError(
                f"scaling.workers {config.scaling.workers} need as many {'GPUs' if on_gpu else 'CPUs'},"
                f" there are {there}"
            )
        count = min(workers or there, there, len(indices))
        kind = ray.remote(_Worker).options(
            num_cpus=1, num_gpus=int(on_gpu), max_restarts=RETRIES, max_task_retries=RETRIES
        )
        actors = [kind.remote(asdict(job_spec), on_gpu, config.scaling.threads or 1) for _ in range(count)]
        terminal.say(f"{count} worker(s) on {'GPUs' if on_gpu else 'CPUs'}, {len(indices)} shards to do")
        return _share_out(actors, indices, terminal, on_done)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise StoppedError.of("evaluation", f"{type(cause).__name__}: {first_line(cause)}") from error
    finally:
        ray.shutdown()


def _share_out(actors: list[Any], indices: list[int], terminal: Terminal, on_done: Callable[[int], None]) -> int:
    """Shards go to actors that have a place in the cluster, one at a time.

    An actor for which nothing is left ends: one that lost its node while it did a shard needs the place.
    """
    left, busy = list(reversed(indices)), {actor.ready.remote(): (actor, -1) for actor in actors}
    worked = time.monotonic()
    while left or any(index >= 0 for _, index in busy.values()):
        ready, _ = ray.wait(list(busy), timeout=0.5)
        if signal := terminal.stop_signal():
            return signal
        if ready or any(index >= 0 and not _has_no_place(actor) for actor, index in busy.values()):
            worked = time.monotonic()
        elif time.monotonic() - worked > PATIENCE:
            worked = time.monotonic()
            terminal.say(
                f"waiting for a place in the cluster: {ray.available_resources().get('CPU', 0):g} CPUs are free"
            )
        for future in ready:
            actor, index = busy.pop(future)
            if trouble := ray.get(future):
                raise error_from_plain(trouble)
            if index >= 0:
                on_done(index)
            if left:
                index = left.pop()
                busy[actor.work.remote(index)] = (actor, index)
            else:
                ray.kill(actor)
    return 0


def _has_no_place(actor: Any) -> bool:
    """Whether an actor that had begun a shard died and waits for a place in which to begin it again."""
    return bool(actor._get_local_state() == ActorTableData.RESTARTING)
