"""A sweep that loses trials and its driver: what is finished stays, the rest goes on from its checkpoints."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient

from dircluster.cluster.storage import open_path
from dircluster.config import StorageConfig
from infra.local_cluster import Cluster
from tests.fault.conftest import Job, command_of, weights_in

Make = Callable[..., Any]
SPACE = """
GRID = [
    {"dir.alpha": 0.0, "dir.optimizer.lr": 1e-3},
    {"dir.alpha": 2.0, "dir.optimizer.lr": 1e-3},
    {"dir.alpha": 2.0, "dir.optimizer.lr": 1e30},
]
"""


def actors(cluster: Cluster) -> list[psutil.Process]:
    """The processes of trials at work."""
    return [p for p in cluster.processes() if " ".join(command_of(p)).startswith("ray::ImplicitFunc")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_raising_trial_a_killed_one_and_a_killed_driver(
    job: Make, unbroken: Make, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(SPACE)
    often = ("--dir.epochs", "20", "--storage.checkpoint-every", "10")
    words = ("--space", str(tmp_path / "mine.py"), "--max-concurrent", "1", "--scaling.workers", "2")
    sweep = job(*words, *often, script="tune").start()
    stored = sweep.wait_for(0, 300)
    (trial,) = actors(cluster)
    os.kill(trial.pid, signal.SIGKILL)
    sweep.wait_until(lambda: "1 of 3 trials" in sweep.said, 300)
    assert sweep.committed() >= stored
    first = {place.name: place.read_text() for place in sweep.storage.glob("trials/*.json")}
    sweep.kill()

    said = len(sweep.said)
    assert sweep.start().end(400) == 1, sweep.said[-3000:]
    again = sweep.said[said:]
    assert "1 of 3 trials" in again.split("2 of 3 trials")[0]  # shown before anything was trained
    assert "training what trials share" not in again
    assert re.search(r"failed: alpha 2, lr 1e\+30, seed 3: dir: .* is not finite at step", again)
    assert "3 of 3 trials" in again
    after = {place.name: place.read_text() for place in sweep.storage.glob("trials/*.json")}
    assert first.items() <= after.items()

    summary = json.loads(sweep.summary.read_text())
    assert sorted(found["status"] for found in summary["trials"]) == ["FAILED", "FINISHED", "FINISHED"]
    (paper,) = (t for t in summary["trials"] if t["settings"] == {"dir.alpha": 2.0, "dir.optimizer.lr": 1e-3})
    assert weights_in(open_path(paper["checkpoint"], StorageConfig())) == unbroken(*often, "--dir.alpha", "2")
    must_have_one_record_a_trial(sweep)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_costs_no_trial(job: Make, unbroken: Make, cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("GRID = {'dir.alpha': [0.0, 2.0]}\n")
    often = ("--dir.epochs", "60", "--storage.checkpoint-every", "10")
    sweep = job("--space", str(tmp_path / "mine.py"), *often, "--scaling.workers", "2", script="tune").start()
    assert sweep.wait_for(0, 300)
    sweep.wait_for_workers(4)  # two trials at work
    cluster.end("node2")
    try:
        assert sweep.end(600) == 0, sweep.said[-3000:]
    finally:
        cluster.start_node(2)
    assert "2 trials, 2 at a time" in sweep.said
    assert "failed" not in sweep.said
    summary = json.loads(sweep.summary.read_text())
    assert [found["status"] for found in summary["trials"]] == ["FINISHED", "FINISHED"]
    (paper,) = (found for found in summary["trials"] if found["settings"] == {"dir.alpha": 2.0})
    assert weights_in(open_path(paper["checkpoint"], StorageConfig())) == unbroken(*often, "--dir.alpha", "2")


def must_have_one_record_a_trial(sweep: Job) -> None:
    """One parent with table and figure; a child a trial, with what varies as its only parameters."""
    client = MlflowClient(sweep.cluster.mlflow_url)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.info.run_name == "digits_smoke-mine-seed0")
    assert parent.info.status == "FAILED"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"figure.png", "results_table.json"}
    assert parent.data.tags["dircluster.best"].startswith("python jobs/train.py digits_smoke ")
    assert len([run for run in runs if run.data.tags.get("dircluster.sweep") == parent.info.run_id]) == 1
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [set(run.data.params) for run in trials] == [{"dir.alpha", "dir.optimizer.lr"}] * 3
    assert sorted(run.info.status for run in trials) == ["FAILED", "FINISHED", "FINISHED"]
    for run in trials:
        if run.info.status == "FINISHED":
            assert set(run.data.metrics) >= {"held_out", "natural", "robust"}
            for name in ("held_out", "natural", "robust"):
                assert len(client.get_metric_history(run.info.run_id, name)) == 1
    stages = [run.data.tags["dircluster.stage"] for run in runs if "dircluster.stage" in run.data.tags]
    assert sorted(stages)[:2] == ["dir", "dir"]
