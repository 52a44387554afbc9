"""Workers, nodes, drivers and heads that die: a run loses no step that was committed, and ends in the same bits."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dircluster.cluster.commands import replay
from infra.local_cluster import PART, Cluster

Make = Callable[..., Any]
Unbroken = Callable[..., dict[str, str]]
EPOCHS, STEPS = "60", 240
KILLS = DRAINS = 20
LONG = ("--dir.epochs", EPOCHS, "--storage.checkpoint-every", "10")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_workers_killed_at_random(job: Make, unbroken: Unbroken) -> None:
    words = ("--dir.epochs", "300", "--storage.checkpoint-every", "10")
    run = job(*words, "--scaling.workers", "2", "--scaling.max-failures", str(KILLS)).start()
    run.end_past_killed_workers(KILLS)
    assert run.weights() == unbroken(*words)
    run.must_have_one_whole_record(1200)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_is_submitted_again(job: Make, unbroken: Unbroken) -> None:
    run = job(*LONG, "--scaling.workers", "2").start()
    stored = run.wait_for(20)
    run.kill()
    assert run.start().end(300) == 0, run.said[-3000:]
    (resumed,) = re.findall(r"dir: resuming at step (\d+)", run.said)
    assert int(resumed) >= stored
    assert run.weights() == unbroken(*LONG)
    run.must_have_one_whole_record(STEPS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_reproduction_goes_on(job: Make, capsys: pytest.CaptureFixture[str]) -> None:
    run = job("--only", "identity,dir", "--evaluation.images", "4", "--evaluation.queries", "10", script="reproduce")
    run.words.insert(0, "table1")
    run.start()
    run.wait_until(lambda: bool(list(run.storage.glob("pretrain-*/final/COMMIT"))))
    run.kill()
    assert run.start().end(300) == 0, run.said[-3000:]
    assert "pretrain: reused from" in run.said
    assert run.said.count("reused: s3://") == 1  # None was over
    found = {
        (cell["line"], cell["column"]): cell for cell in json.loads(run.summary.read_text())["exhibits"][0]["cells"]
    }
    assert found["DIR", "pgd20"]["found"]["images"] == 4
    assert len(list(run.storage.glob("reproductions/*/claims/*.json"))) == 2
    (command,) = found["DIR", "pgd20"]["replays"]
    assert "s3://" in command
    assert replay.main(shlex.split(command)[2:]) == 0
    assert "images   the same to the bit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_lost_node_shrinks_the_run_and_its_return_grows_it(job: Make, unbroken: Unbroken, cluster: Cluster) -> None:
    long = ("--dir.epochs", "600", "--storage.checkpoint-every", "20")
    run = job(*long, "--scaling.workers", "1:4", "--scaling.resize-every", "10").start()
    run.wait_for_workers(4)
    run.wait_for(run.committed())
    grown = run.said.count("dir: resuming")  # it may have begun with less than there is
    cluster.end("node2")
    stored = run.committed()
    try:
        run.wait_for(stored + 20, 300)
        assert len(run.workers()) == 2
    finally:
        cluster.start_node(2)
    run.wait_for_workers(4)
    assert run.end(900) == 0, run.said[-3000:]
    assert int(re.findall(r"dir: resuming at step (\d+)", run.said)[grown]) >= stored
    assert run.weights() == unbroken(*long)
    run.must_have_one_whole_record(2800)


def announce_the_end_of(node: str, cluster: Cluster) -> None:
    """Have Ray say that a node is taken away in a minute, as a cloud does of a spot machine."""
    ray = str(Path(sys.executable).parent / "ray")
    environment = os.environ | cluster.environment() | {"RAY_ADDRESS": cluster.gcs}

    def said(*words: str) -> str:
        done = subprocess.run([ray, *words], env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    address = f"{cluster.facts['address']}{int(node.removeprefix('node')) + 1}"
    nodes = json.loads(said("list", "nodes", "--format", "json", "--limit", "1000"))
    (number,) = (found["node_id"] for found in nodes if (found["node_ip"], found["state"]) == (address, "ALIVE"))
    reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test")
    said("drain-node", "--node-id", number, *reason, "--deadline-remaining-seconds", "60")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_that_is_announced_to_go_costs_neither_a_step_nor_a_retry(
    job: Make, unbroken: Unbroken, cluster: Cluster
) -> None:
    long = ("--dir.epochs", "700", "--storage.checkpoint-every", "10000")  # what is stored is stored for a notice
    run = job(*long, "--scaling.workers", "2", "--scaling.max-failures", "0").start()
    for times in range(DRAINS):
        run.wait_until(lambda: any(run.storage.glob("pretrain-*/final/COMMIT")))
        run.wait_until(lambda done=times: run.said.count("dir: resuming at step") == done)  # type: ignore[misc]
        time.sleep(2)
        before = run.workers()
        (node,) = {worker.environ()[PART] for worker in before}
        announce_the_end_of(node, cluster)
        run.wait_for_workers(2, gone=before)
        assert {worker.environ()[PART] for worker in run.workers()} == {"node1", "node2"} - {node}
        cluster.end(node)
        cluster.start_node(int(node.removeprefix("node")))
    assert run.end(900) == 0, run.said[-3000:]
    resumed = [int(step) for step in re.findall(r"dir: resuming at step (\d+)", run.said)]
    assert len(resumed) == run.said.count("a node is about to be taken away") == DRAINS
    assert run.weights() == unbroken(*long)
    run.must_have_one_whole_record(2800)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_head_is_started_again(job: Make, unbroken: Unbroken, cluster: Cluster) -> None:
    run = job(*LONG, "--scaling.workers", "2").start()
    stored = run.wait_for(20)
    for part in ("head", "node1", "node2"):
        cluster.end(part)
    assert run.end(180) == 1
    assert "error: the cluster is gone" in run.said or "error: Ray Train gave up" in run.said
    cluster.up()
    assert run.start().end(400) == 0, run.said[-3000:]
    assert int(re.findall(r"dir: resuming at step (\d+)", run.said)[-1]) >= stored
    assert run.weights() == unbroken(*LONG)
    run.must_have_one_whole_record(STEPS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_worker_is_an_error_with_all_stacks(job: Make) -> None:
    run = job(*LONG, "--scaling.workers", "2", "--scaling.stall", "15").start()
    run.wait_for(10)
    stopped = run.workers()[1]
    began = time.monotonic()
    stopped.suspend()
    try:
        assert run.end(300) == 1, run.said[-3000:]
    finally:
        if stopped.is_running():
            stopped.kill()
    assert time.monotonic() - began < 15 + 120
    assert "no worker made progress for 15 s (scaling.stall)" in run.said
    for rank in (0, 1):
        assert re.search(rf"worker {rank}: .*?(Thread \d+|no stack)", run.said, re.DOTALL), run.said[-3000:]
    assert "stopped by a signal" in run.said
    assert "dircluster/training/trainer.py" in run.said
