"""A judgement on Ray workers: actors take unit after unit; what they finish lies in storage."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray

from dircluster.cluster import nodes
from dircluster.cluster.bench import Bench, Brief
from dircluster.cluster.console import Terminal
from dircluster.cluster.ray_train import start_ray
from dircluster.config import ConfigError, RunConfig

RETRIES = 4
"""Times that a worker which died is started again, and its unit with it."""


class _Worker:
    """One actor and its bench."""

    def __init__(self, brief: dict[str, Any], on_gpu: bool, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.brief, self.device = Brief(**brief), torch.device("cuda" if on_gpu else "cpu")
        self.bench: Bench | None = None

    def work(self, place: int) -> str | None:
        """Do one unit; -> None, or why it cannot be done."""
        try:
            if self.bench is None:
                self.bench = Bench(self.brief, self.device)
            self.bench.work(place)
        except ConfigError as error:
            return str(error)
        return None


def work(
    brief: Brief,
    config: RunConfig,
    workers: int | None,
    places: list[int],
    terminal: Terminal,
    told: Callable[[int], None],
) -> int:
    """Do the units at ``places`` on ``workers`` actors, or as many as there are CPUs or GPUs; -> the signal, or 0.

    ``told`` hears the place of each unit that is finished. Raises ConfigError where the cluster cannot do it.
    """
    try:
        start_ray(config)
        terminal.listen()
        nodes.must_suffice(config.scaling, terminal)
        if os.environ.get("RAY_ADDRESS"):
            nodes.must_run_this_version()
        gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        on_gpu = config.scaling.device == "gpu" or (config.scaling.device == "auto" and gpus > 0)
        count = min(workers or (gpus if on_gpu else cpus), len(places))
        kind = ray.remote(_Worker).options(
            num_cpus=1, num_gpus=int(on_gpu), max_restarts=RETRIES, max_task_retries=RETRIES
        )
        actors = [kind.remote(asdict(brief), on_gpu, config.scaling.threads or 1) for _ in range(count)]
        terminal.say(f"{count} worker(s) on {'GPUs' if on_gpu else 'CPUs'}, {len(places)} units to do")
        return _share_out(actors, places, terminal, told)
    except ray.exceptions.RayError as error:
        line = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the judgement stopped ({type(error).__name__}: {line}); the same command goes on"
        ) from error
    finally:
        ray.shutdown()


def _share_out(actors: list[Any], places: list[int], terminal: Terminal, told: Callable[[int], None]) -> int:
    left = list(reversed(places))
    busy = {actor.work.remote(place): (actor, place) for actor in actors if left and (place := left.pop()) >= 0}
    while busy:
        ready, _ = ray.wait(list(busy), timeout=0.5)
        if signal := terminal.stop_signal():
            return signal
        for future in ready:
            actor, place = busy.pop(future)
            if trouble := ray.get(future):
                raise ConfigError(trouble)
            told(place)
            if left:
                place = left.pop()
                busy[actor.work.remote(place)] = (actor, place)
    return 0
