"""A run on Ray Train workers: the same pipeline in each, one mailbox between them and the person's terminal."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train import FailureConfig
from ray.train import RunConfig as RayRunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchTrainer

from dircluster.cluster.console import Terminal
from dircluster.cluster.mlflow_tracker import JobRecord, MlflowTracker
from dircluster.config import ConfigError, RunConfig, from_dict, to_dict
from dircluster.training.loop import NonFiniteLoss
from dircluster.training.parallel import joined_workers
from dircluster.training.pipeline import Run, storage_path
from dircluster.training.ports import Console, Interrupted, NoTracker, Quiet, Status, Tracker

POLL = 0.3
"""Seconds between two looks into the mailbox."""
GRACE = 25.0
"""Seconds that workers have to commit a checkpoint after a signal, before they are ended."""


class Mailbox:
    """Carries lines, progress and the outcome from the first worker to the driver, and the wish to stop back."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.signal = 0
        self.outcome: dict[str, Any] | None = None

    def exchange(self, events: list[Any]) -> int:
        """Worker's side: hand over events; -> the signal that asks to stop, or 0."""
        self.events += events
        return self.signal

    def collect(self, signal: int) -> tuple[list[Any], dict[str, Any] | None]:
        """Driver's side: -> events since the last call, and the outcome when there is one."""
        self.signal = signal
        events, self.events = self.events, []
        return events, self.outcome

    def finish(self, outcome: dict[str, Any]) -> None:
        """Worker's side: the run ended so."""
        self.outcome = outcome


class RemoteConsole:
    """The driver's terminal, seen from the first worker; it talks in the background."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._events: list[Any] = []
        self._signal = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="console", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        with self._lock:
            self._events.append(line)

    def show(self, status: Status) -> None:
        with self._lock:
            self._events.append(status)

    def stop_signal(self) -> int:
        return self._signal

    def close(self) -> None:
        """Hand over what is left."""
        self._closed.set()
        self._thread.join(10)

    def _talk(self) -> None:
        while True:
            last = self._closed.wait(POLL)
            with self._lock:
                events, self._events = self._events, []
            self._signal = ray.get(self._mailbox.exchange.remote(events))
            if last:
                return


@dataclass(frozen=True)
class Task:
    """What a worker is told, as plain data."""

    config: dict[str, Any]
    token: str | None
    job: JobRecord | None


def _worker(told: dict[str, Any]) -> None:
    task: Task = told["task"]
    config: RunConfig = from_dict(RunConfig, task.config)
    context = ray.train.get_context()
    parallel = joined_workers(config.scaling, ray.train.torch.get_device(), context.get_local_world_size())
    console: Console = Quiet()
    tracker: Tracker = NoTracker()
    remote = RemoteConsole(told["mailbox"]) if parallel.first else None
    if remote is not None:
        console = remote
        if task.job is not None:
            tracker = MlflowTracker(task.job, remote.say)
    try:
        outcome = {"status": "FINISHED", **Run(config, parallel, tracker, console, token=task.token).execute()}
    except Interrupted as stop:
        outcome = {"status": "KILLED", "signal": stop.signal}
    except (ConfigError, NonFiniteLoss) as error:
        outcome = {"status": "FAILED", "error": str(error), "exit": 2 if isinstance(error, ConfigError) else 1}
    finally:
        if isinstance(tracker, MlflowTracker):
            tracker.close()
    if remote is not None:
        remote.close()
        ray.get(told["mailbox"].finish.remote(outcome))


def start_ray(config: RunConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine.

    Raises ConfigError where a cluster is smaller than ``scaling`` asks for.
    """
    workers, device = config.scaling.workers, config.scaling.device
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        cpus = max(os.cpu_count() or 1, workers)
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=100_000_000,
        )
    found = ray.cluster_resources()
    kind = "GPU" if device == "gpu" else "CPU"
    if found.get(kind, 0) < workers:
        raise ConfigError(f"scaling.workers {workers} need as many {kind}s, but the cluster has {found.get(kind, 0):g}")


def train(config: RunConfig, token: str | None, job: JobRecord | None, terminal: Terminal) -> dict[str, Any]:
    """Run on ``scaling.workers`` Ray Train workers: -> the outcome, with ``status`` FINISHED, FAILED or KILLED."""
    start_ray(config)
    workers = config.scaling.workers
    on_gpu = config.scaling.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= workers
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"task": Task(to_dict(config), token, job), "mailbox": mailbox},
        scaling_config=RayScalingConfig(
            num_workers=workers, use_gpu=on_gpu, resources_per_worker={"GPU": 1} if on_gpu else {"CPU": 1}
        ),
        run_config=RayRunConfig(
            name="ray-train",
            storage_path=str(storage_path(config).resolve()),
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
        ),
    )
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # whatever ended it is told in the driver's own words
            errors.append(error)

    fitting = threading.Thread(target=fit, name="ray-train", daemon=True)  # outside the main thread Ray leaves
    fitting.start()  # the signals alone
    try:
        return _follow(fitting, mailbox, terminal, errors)
    finally:
        ray.shutdown()


def _follow(fitting: threading.Thread, mailbox: Any, terminal: Terminal, errors: list[BaseException]) -> dict[str, Any]:
    asked: float | None = None
    while True:
        alive = fitting.is_alive()
        events, outcome = ray.get(mailbox.collect.remote(terminal.stop_signal()))
        for event in events:
            if isinstance(event, Status):
                terminal.show(event)
            else:
                terminal.say(event)
        if outcome is not None:
            fitting.join(5)
            return dict(outcome)
        if not alive:
            last = traceback.format_exception_only(errors[0])[-1].strip() if errors else "no outcome"
            return {"status": "FAILED", "error": f"Ray Train gave up: {last.splitlines()[0]}", "exit": 1}
        if terminal.stop_signal():
            asked = asked or time.monotonic()
            if time.monotonic() - asked > GRACE:
                return {"status": "KILLED", "signal": terminal.stop_signal()}
        time.sleep(POLL)
