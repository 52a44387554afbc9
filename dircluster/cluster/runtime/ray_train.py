"""A run on Ray Train workers, seen from the process that the person started."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig
from ray.train import RunConfig as RayRunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dircluster.cluster import storage
from dircluster.cluster.runtime import nodes, stack_dump
from dircluster.cluster.runtime.channel import POLL, WorkerChannel
from dircluster.cluster.runtime.watch import Follower, Watch
from dircluster.config import ConfigError, RunConfig, first_line
from dircluster.presets import run_to_plain

if TYPE_CHECKING:  # the controller's process loads this module too: keep it light
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.tracking.jobs import JobRecord


def _worker(arguments: dict[str, Any]) -> None:
    from dircluster.cluster.runtime.ray_worker import work

    work(**arguments)


def train(config: RunConfig, owner: str, fresh: bool, record: JobRecord | None, terminal: Terminal) -> dict[str, Any]:
    """Run on ``scaling.workers`` Ray Train workers: -> the outcome, with ``status`` FINISHED, FAILED or KILLED.

    Raises ConfigError where the cluster is too small or runs another version of this code.
    """
    job: Job | None = None
    try:
        join_cluster(config, terminal)
        job = Job(config, owner, fresh, record, terminal)
        return job.follow()
    except ray.exceptions.RayError as error:
        reason = first_line(error)
        return {"status": "FAILED", "error": f"the cluster is gone ({reason}); the same command resumes", "exit": 1}
    finally:
        ray.shutdown()
        if job is not None:
            job.fitting.join(15)  # a thread inside Ray must not outlive it
        forget(config, owner)


def join_cluster(config: RunConfig, terminal: Terminal) -> None:
    """Join or start a cluster that is large enough and runs this version. Raises ConfigError where there is none."""
    _start_ray(config)
    terminal.listen()
    nodes.must_suffice(config.scaling, terminal)
    if os.environ.get("RAY_ADDRESS"):
        nodes.must_run_this_version()


def _start_ray(config: RunConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine. Raises ConfigError."""
    address, cores = os.environ.get("RAY_ADDRESS"), os.cpu_count() or 1
    own: dict[str, Any] = {
        "address": "local",
        "num_cpus": cores if config.scaling.device == "gpu" else max(cores, config.scaling.most),
        "include_dashboard": False,
        "object_store_memory": 100_000_000,
    }
    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING, **({} if address else own))
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        what = f"no Ray cluster answers at RAY_ADDRESS {address}" if address else "Ray cannot start on this machine"
        raise ConfigError(f"{what}: {first_line(error)}") from error


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


class Job:
    """One run while it lasts, in a process that has joined the cluster."""

    def __init__(
        self,
        config: RunConfig,
        owner: str,
        fresh: bool,
        record: JobRecord | None,
        terminal: Follower,
        until: str = "",
    ) -> None:
        self.scaling, self.terminal = config.scaling, terminal
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.channel = ray.remote(num_cpus=0)(WorkerChannel).options(scheduling_strategy=here).remote()  # nodes may go
        arguments = {
            "config": run_to_plain(config),
            "owner": owner,
            "fresh": fresh,
            "until": until,
            "record": None if record is None else asdict(record),
            "channel": self.channel,
        }
        least, most = self.scaling.least, self.scaling.most
        on_gpu = self.scaling.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= least
        self.trainer = TorchTrainer(
            _worker,
            train_loop_config=arguments,
            torch_config=TorchConfig(timeout_s=max(60, int(2 * self.scaling.stall))),
            scaling_config=RayScalingConfig(
                num_workers=most if least == most else (least, most),
                elastic_resize_monitor_interval_s=self.scaling.resize_every,
                use_gpu=on_gpu,
                resources_per_worker={"GPU": 1} if on_gpu else {"CPU": 1},
            ),
            run_config=RayRunConfig(
                name=owner,
                failure_config=FailureConfig(max_failures=self.scaling.max_failures),
                **storage.for_ray(config),
            ),
        )
        # Outside the main thread Ray leaves the signals alone.
        self.fitting = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        self.errors: list[BaseException] = []
        self.watch = Watch(
            config.scaling,
            terminal,
            stack_dump.dump,
            stack_dump.end,
            lambda: float(ray.available_resources().get("CPU", 0)),
        )

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # reported by follow(), in the main thread
            self.errors.append(error)

    def follow(self) -> dict[str, Any]:
        """Until the run ends: -> its outcome."""
        self.fitting.start()
        while True:
            alive = self.fitting.is_alive()
            seen = ray.get(self.channel.collect.remote(self.terminal.stop_signal()))
            outcome = self.watch.look(seen, alive, self.errors)
            if outcome is not None:
                if seen.outcome is not None:
                    self.fitting.join(5)
                return outcome
            time.sleep(POLL)
