"""A driver follows a run: workers that leave a node that goes are started again, and no retry is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from dircluster.cluster.runtime import ray_train
from dircluster.cluster.runtime.channel import WorkerChannel
from dircluster.cluster.runtime.ray_train import Job
from dircluster.cluster.runtime.watch import Watch
from dircluster.config import ScalingConfig, StorageConfig
from dircluster.presets import preset
from tests.unit.cluster.conftest import Actor, Clock, Terminal

DONE = {"status": "FINISHED"}
Fit = Callable[[WorkerChannel, Terminal], None]
Follow = Callable[..., tuple[dict[str, Any], int]]
"""What Ray Train does at each call -> the outcome of following it, and how often it was called."""


def leave(channel: WorkerChannel, _: Terminal) -> None:
    channel.enter(0, 1, "node", 11)
    channel.leave()


def finish(channel: WorkerChannel, _: Terminal) -> None:
    channel.enter(0, 1, "another node", 12)
    channel.finish(DONE)


def leave_and_fail(channel: WorkerChannel, terminal: Terminal) -> None:
    leave(channel, terminal)
    raise RuntimeError("out of luck")


@pytest.fixture
def follow(clock: Clock, terminal: Terminal, no_ray: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Follow:
    no_ray(ray_train)

    def run(*fits: Fit) -> tuple[dict[str, Any], int]:
        job, channel, left = Job.__new__(Job), WorkerChannel(clock), list(fits)
        job.scaling, job.terminal, job.errors = ScalingConfig(), terminal, []  # type: ignore[assignment]
        job.channel = Actor(channel)
        job.trainer = SimpleNamespace(fit=lambda: left.pop(0)(channel, terminal))  # type: ignore[assignment]
        job.watch = Watch(job.scaling, job.terminal, lambda _: {}, lambda _: None, lambda: 1.0, clock)
        job.fitting = job._thread()

        def sleep(seconds: float) -> None:
            job.fitting.join()  # its thread knows no clock: the driver's would run out before it begins
            clock.sleep(seconds)

        monkeypatch.setattr(ray_train, "time", SimpleNamespace(sleep=sleep))
        return job.follow(lambda: None), len(fits) - len(left)

    return run


@pytest.mark.parametrize("nodes", [1, 3])
def test_workers_that_left_are_started_again(follow: Follow, terminal: Terminal, nodes: int) -> None:
    assert follow(*[leave] * nodes, finish) == (DONE, nodes + 1)
    assert terminal.said.count("a node is about to be taken away: the run goes on elsewhere") == nodes


def test_a_run_that_is_stopped_meanwhile_is_not(
    follow: Follow, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = WorkerChannel.collect

    def stop_after(channel: WorkerChannel, signal: int) -> Any:
        terminal.signal = 15  # heard while the driver looks
        return looked(channel, signal)

    monkeypatch.setattr(WorkerChannel, "collect", stop_after)
    assert follow(leave, finish) == ({"status": "KILLED", "signal": 15}, 1)


def test_nor_is_one_that_failed(follow: Follow) -> None:
    outcome, calls = follow(leave_and_fail, finish)
    assert (outcome["status"], calls) == ("FAILED", 1)
    assert outcome["error"].startswith("Ray Train gave up")


@pytest.mark.parametrize(
    ("alone", "there", "device", "count", "on_gpu"),
    [
        (True, {"CPU": 2.0}, "auto", 2, False),
        (True, {"CPU": 16.0, "GPU": 1.0}, "auto", 1, True),
        (False, {"CPU": 2.0}, "auto", (1, 4), False),
        (False, {"CPU": 2.0}, "gpu", (1, 4), True),  # as where a node with GPUs has just gone
        (False, {"CPU": 2.0, "GPU": 2.0}, "cpu", (1, 4), False),
    ],
)
def test_a_cluster_of_its_own_gives_what_it_has(
    alone: bool,
    there: dict[str, float],
    device: Literal["auto", "cpu", "gpu"],
    count: int | tuple[int, int],
    on_gpu: bool,
    no_ray: Callable[..., None],
    terminal: Terminal,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: Actor(WorkerChannel())))
    node = SimpleNamespace(get_node_id=lambda: "0" * 56)
    no_ray(
        ray_train,
        cluster_resources=lambda: there,
        get_runtime_context=lambda: node,
        remote=lambda **_: lambda kind: actor,
    )
    given: dict[str, Any] = {}
    monkeypatch.setattr(ray_train, "LeanTrainer", lambda *_, **named: given.update(named))
    run = preset("digits_smoke")
    run = replace(run, scaling=ScalingConfig(workers="1:4", device=device), storage=StorageConfig(uri=str(tmp_path)))
    Job(run, "owner", False, terminal, alone=alone)  # type: ignore[arg-type]
    assert (given["scaling_config"].num_workers, given["scaling_config"].use_gpu) == (count, on_gpu)
    assert given["scaling_config"].resources_per_worker == ({"GPU": 1} if on_gpu else {"CPU": 1})
