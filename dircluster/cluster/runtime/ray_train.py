"""A run on Ray Train workers, seen from a process that has joined the cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig
from ray.train import RunConfig as RayRunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dircluster.cluster import storage
from dircluster.cluster.runtime import stack_dump
from dircluster.cluster.runtime.channel import POLL, WorkerChannel
from dircluster.cluster.runtime.introduction import Introduction
from dircluster.cluster.runtime.lean_trainer import LeanTrainer
from dircluster.cluster.runtime.watch import Follower, Watch
from dircluster.config import RunConfig
from dircluster.presets import run_to_plain

if TYPE_CHECKING:  # the controller's process loads this module too: keep it light
    from dircluster.cluster.tracking.jobs import JobRecord


def _worker(arguments: dict[str, Any]) -> None:
    from dircluster.cluster.runtime.ray_worker import work

    work(**arguments)


class Job:
    """One run while it lasts, in a process that has joined the cluster."""

    def __init__(
        self,
        config: RunConfig,
        owner: str,
        fresh: bool,
        terminal: Follower,
        until: str = "",
        alone: bool = False,
        patient: bool = False,
    ) -> None:
        """``alone``: the cluster was started for this run. ``patient``: it waits for workers as long as it takes."""
        self.scaling, self.terminal = config.scaling, terminal
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.channel = ray.remote(num_cpus=0)(WorkerChannel).options(scheduling_strategy=here).remote()  # nodes may go
        least, most = self.scaling.least, self.scaling.most
        found = ray.cluster_resources()
        if alone:
            least = most = self.scaling.workers_on(int(found.get("CPU", 0)), int(found.get("GPU", 0)))
        asked = self.scaling.device
        on_gpu = asked == "gpu" or (asked == "auto" and found.get("GPU", 0) >= least)  # one that is asked for may come
        there = replace(config, scaling=replace(self.scaling, device="gpu" if on_gpu else "cpu"))
        arguments = {
            "config": run_to_plain(there),
            "owner": owner,
            "fresh": fresh,
            "until": until,
            "channel": self.channel,
        }
        self.trainer = LeanTrainer(
            _worker,
            alone=alone,
            train_loop_config=arguments,
            backend_config=Introduction(),
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
        self.fitting = self._thread()
        self.errors: list[BaseException] = []
        self.watch = Watch(
            config.scaling,
            terminal,
            stack_dump.dump,
            stack_dump.end,
            lambda: float(ray.available_resources().get("CPU", 0)),
            patient=patient,
        )

    def _thread(self) -> threading.Thread:
        return threading.Thread(target=self._fit, name="ray-train", daemon=True)  # a main thread's signals Ray takes

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # reported by follow(), in the main thread
            self.errors.append(error)

    def follow(
        self,
        record: Callable[[], JobRecord | None],
        on_outcome: Callable[[dict[str, Any]], None] = lambda outcome: None,
    ) -> dict[str, Any]:
        """Until the run ends: -> its outcome. ``on_outcome`` is called with it while Ray Train still ends.

        ``record`` is called while workers start; they wait for it. What it raises passes through. Where a node is
        about to be taken away workers commit and return, and Ray Train starts them again on those that stay.
        """
        self.fitting.start()
        found = record()
        if signal := self.terminal.stop_signal():  # nothing was begun
            return {"status": "KILLED", "signal": signal}
        ray.get(self.channel.open.remote(None if found is None else asdict(found)))
        while True:
            alive = self.fitting.is_alive()
            seen = ray.get(self.channel.collect.remote(self.terminal.stop_signal()))
            left = seen.left and not alive and not self.errors
            outcome = self.watch.look(seen, alive or left, self.errors)
            if outcome is None and left and (signal := self.terminal.stop_signal()):
                outcome = {"status": "KILLED", "signal": signal}
            if outcome is None and left:
                self.terminal.say("a node is about to be taken away: the run goes on elsewhere")
                self.fitting = self._thread()  # no failure is counted
                self.fitting.start()
            if outcome is not None:
                on_outcome(outcome)
                if seen.outcome is not None:
                    self.fitting.join(5)
                return outcome
            time.sleep(POLL)
