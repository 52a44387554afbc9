"""A run on Ray Train workers, seen from the process that the person started."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig
from ray.train import RunConfig as RayRunConfig
from ray.train import ScalingConfig as RayScalingConfig
from ray.train.torch import TorchTrainer

from dircluster.cluster.mailbox import POLL, Mailbox
from dircluster.config import ConfigError, RunConfig, to_dict

if TYPE_CHECKING:  # the controller's process loads this module too: keep it light
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.mlflow_tracker import JobRecord

GRACE = 25.0
"""Seconds that workers have to commit a checkpoint after a signal, before they are ended."""


def _worker(told: dict[str, Any]) -> None:
    from dircluster.cluster.ray_worker import work

    work(**told)


def start_ray(config: RunConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine.

    Raises ConfigError where the cluster is smaller than ``scaling`` asks for.
    """
    workers, device = config.scaling.workers, config.scaling.device
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, workers),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=100_000_000,
        )
    kind = "GPU" if device == "gpu" else "CPU"
    found = ray.cluster_resources().get(kind, 0)
    if found < workers:
        raise ConfigError(f"scaling.workers {workers} need as many {kind}s, but the cluster has {found:g}")


def train(config: RunConfig, token: str | None, record: JobRecord | None, terminal: Terminal) -> dict[str, Any]:
    """Run on ``scaling.workers`` Ray Train workers: -> the outcome, with ``status`` FINISHED, FAILED or KILLED."""
    try:
        start_ray(config)
        terminal.listen()
        return _follow(config, token, record, terminal)
    finally:
        ray.shutdown()


def _follow(config: RunConfig, token: str | None, record: JobRecord | None, terminal: Terminal) -> dict[str, Any]:
    workers = config.scaling.workers
    on_gpu = config.scaling.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= workers
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    told = {
        "config": to_dict(config),
        "token": token,
        "record": None if record is None else asdict(record),
        "mailbox": mailbox,
    }
    trainer = TorchTrainer(
        _worker,
        train_loop_config=told,
        scaling_config=RayScalingConfig(
            num_workers=workers, use_gpu=on_gpu, resources_per_worker={"GPU": 1} if on_gpu else {"CPU": 1}
        ),
        run_config=RayRunConfig(
            name="ray-train",
            storage_path=config.storage.uri,
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
        ),
    )
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # told below, in the main thread
            errors.append(error)

    # Outside the main thread Ray leaves the signals alone.
    fitting = threading.Thread(target=fit, name="ray-train", daemon=True)
    fitting.start()
    asked: float | None = None
    while True:
        alive = fitting.is_alive()
        events, outcome = ray.get(mailbox.collect.remote(terminal.stop_signal()))
        for event in events:
            terminal.tell(event)
        if outcome is not None:
            fitting.join(5)
            return dict(outcome)
        if not alive:
            terminal.say("".join(traceback.format_exception(errors[0])) if errors else "no worker told an outcome")
            return {"status": "FAILED", "error": "Ray Train gave up; the reason stands above", "exit": 1}
        if terminal.stop_signal():
            asked = asked or time.monotonic()
            if time.monotonic() - asked > GRACE:
                return {"status": "KILLED", "signal": terminal.stop_signal()}
        time.sleep(POLL)
