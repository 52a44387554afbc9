"""The default path: Ray Train workers, a record in MLflow, a registered model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

import dircluster

Train = Callable[..., Any]


def record(folder: Path) -> tuple[MlflowClient, Any, dict[str, Any]]:
    """The client, the one parent run and its children by stage."""
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("dircluster")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = {r.data.tags["dircluster.stage"]: r for r in runs if r is not parents[0]}
    assert all(child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id for child in children.values())
    return client, parents[0], children


def points(client: MlflowClient, run: Any, name: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


def test_train_then_again(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = train("digits_smoke")
    assert done.code == 0, done.err
    assert "Accuracy on the test split" in done.out
    assert "models:/dir-digits_smoke@champion" in done.out
    client, parent, children = record(tmp_path)
    assert parent.info.run_id == done.summary["run_id"]
    assert parent.info.status == "FINISHED"
    assert set(children) == {"target", "pretrain", "dir"}
    for stage, child in children.items():
        assert child.info.status == "FINISHED"
        assert points(client, child, "loss/total") == list(range(1, 9))
        assert {"held_out/natural", "held_out/robust", "images_per_second"} <= set(child.data.metrics)
        assert child.data.params[f"{stage}.epochs"] == "2"
    assert {"loss/adversarial", "loss/representation", "lr/denoiser"} <= set(children["dir"].data.metrics)
    assert (parent.data.params["masking.ratio"], parent.data.params["dir.alpha"]) == ("0.5", "0.5")
    assert len(parent.data.tags["dircluster.commit"]) >= 7
    assert parent.inputs.dataset_inputs[0].dataset.name == "digits"
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"config.yaml", "model_card.md", "results.json", "results_table.json"} <= artifacts
    pictures = client.list_artifacts(children["dir"].info.run_id, "images")
    assert len([p for p in pictures if p.path.endswith(".png")]) == 2  # one an epoch

    again = train("digits_smoke", "--launcher", "local")  # the same run, whoever starts it
    assert again.code == 0, again.err
    assert again.out.count("reused from") == 4
    assert again.summary["run_id"] == done.summary["run_id"]
    assert again.summary["results"] == done.summary["results"]
    client, parent, children = record(tmp_path)
    assert points(client, children["dir"], "loss/total") == list(range(1, 9))
    assert len(client.search_model_versions("name='dir-digits_smoke'")) == 1

    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    registered = dircluster.load_defense("models:/dir-digits_smoke@champion")
    assert torch.equal(
        registered.fixed(0)(images), dircluster.load_defense(done.summary["checkpoint"]).fixed(0)(images)
    )
    stored = list((tmp_path / "runs" / "artifacts").rglob("*"))
    assert any(file.suffix == ".safetensors" for file in stored)
    assert not [file for file in stored if file.suffix in (".pkl", ".pt", ".pth", ".pickle")]


@pytest.mark.slow
def test_a_registered_defense_gives_its_target(train: Train) -> None:
    assert train("digits_smoke", "--launcher", "local").code == 0
    given = train("digits_smoke", "--launcher", "local", "--target.uri", "models:/dir-digits_smoke@champion")
    assert given.code == 0, given.err
    assert "target: taken from" in given.out


@pytest.mark.slow
def test_signals_on_ray_commit_and_the_same_command_continues_the_record(
    train: Train, start: Any, tmp_path: Path
) -> None:
    words = ("digits_smoke", "--target.epochs", "200", "--dir.epochs", "60", "--storage.checkpoint-every", "50")
    for number, code, sign in ((signal.SIGTERM, 143, "target  "), (signal.SIGINT, 130, "dir  ")):
        process = start(*words)
        for line in process.stdout:
            if line.startswith(sign):
                break
        began = time.monotonic()
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == code, out
        assert time.monotonic() - began < 120
        assert "resume with: python jobs/train.py digits_smoke" in out
        _, parent, children = record(tmp_path)
        assert parent.info.status == "KILLED"
        assert children[sign.strip()].info.status == "KILLED"
    done = train(*words)
    assert done.code == 0, done.err
    assert "dir: resuming at step" in done.out
    client, parent, children = record(tmp_path)
    assert (parent.info.status, children["dir"].info.status) == ("FINISHED", "FINISHED")
    assert points(client, children["dir"], "loss/total") == list(range(1, 241))


@pytest.mark.parametrize("script", ["train", pytest.param("tune_alpha", marks=pytest.mark.slow)])
def test_more_gpus_than_there_are_is_one_line(train: Train, script: str) -> None:
    done = train("digits_smoke", "--scaling.workers", "16", "--scaling.device", "gpu", script=script, here=True)
    assert (done.code, len(done.error)) == (2, 1), done.err
    assert "scaling.workers 16 need as many GPUs" in done.error[0]


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_misses_nothing(mlflow_server: Any, start: Any) -> None:
    words = ("digits_smoke", "--launcher", "local", "--dir.epochs", "150", "--tracking.uri", mlflow_server.uri)
    process = start(*words)
    for line in process.stdout:
        if line.startswith("dir  "):
            break
    mlflow_server.stop()
    for line in process.stdout:
        if "keeping records until it does" in line:
            break
    time.sleep(3)
    mlflow_server.start()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("dircluster")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`dircluster.stage` = 'dir'")
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    assert points(client, runs[0], "loss/total") == list(range(1, 601))


def test_a_server_that_does_not_answer_is_one_line(train: Train) -> None:
    done = train("digits_smoke", "--launcher", "local", "--tracking.uri", "http://127.0.0.1:9")
    assert (done.code, len(done.error)) == (2, 1), done.err
    assert "tracking.uri 'http://127.0.0.1:9' cannot be used" in done.error[0]
