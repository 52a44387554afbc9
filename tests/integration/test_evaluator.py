"""MLflow's own evaluate() with this package as evaluator: metrics, report, and a ranking of logged models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient, fluent
from mlflow.types import Schema, TensorSpec

import dircluster.cluster.tracking.evaluator  # noqa: F401 - registers, where the package is not installed
from dircluster.config import DataConfig
from dircluster.data.sources import load

CONFIG = {"images": 16, "steps": 2, "epsilon": 0.05, "verdict": False}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")  # MLflow leaves both to the processes that it starts
    before, experiment = {name: os.environ.get(name) for name in names}, fluent._active_experiment_id
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.create_experiment("rank", artifact_location=str(tmp_path / "artifacts"))
    mlflow.set_experiment("rank")
    yield uri
    mlflow.set_tracking_uri(before["MLFLOW_TRACKING_URI"] or "")
    fluent._active_experiment_id = experiment
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def test_logged_models_rank_by_robust_accuracy(store: str, caplog: pytest.LogCaptureFixture) -> None:
    test = load(DataConfig(), 0).test.take(slice(32))
    data = mlflow.data.from_numpy(test.pixels().flatten(1).numpy(), targets=test.labels.numpy(), name="digits")
    shape = (-1, 1, 8, 8)
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("float32"), shape)]), Schema([TensorSpec(np.dtype("float32"), (-1, 10))])
    )
    weak = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    strong = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():  # templates: the mean image of each class
        pixels = test.pixels().flatten(1)
        means = torch.stack([pixels[test.labels == label].mean(dim=0) for label in range(10)])
        strong[1].weight.copy_(means)
        strong[1].bias.copy_(-0.5 * means.square().sum(dim=1))
    client, results = MlflowClient(store), {}
    for name, module, registered in (("weak", weak, None), ("strong", strong, "strong")):
        logged = mlflow.pytorch.log_model(
            module,
            name=name,
            signature=signature,
            registered_model_name=registered,
            serialization_format="pickle",
            pip_requirements=["torch"],  # where none are given, MLflow loads the model in another process to find them
        )
        uri = logged.model_uri
        if registered:  # MLflow knows no logged model behind an alias
            client.set_registered_model_alias(name, "champion", "1")
            uri = "models:/strong@champion"
        with mlflow.start_run(run_name=name) as run:
            found = mlflow.models.evaluate(
                uri, data, model_type="classifier", evaluators="dircluster", evaluator_config=CONFIG
            )
            results[logged.model_id] = found.metrics["robust_accuracy"]
        recorded = client.get_run(run.info.run_id).data.metrics
        lowest = min(recorded[f"test/defense/{attack}/none"] for attack in ("pgd2", "pgd2-margin", "malt"))
        assert recorded["robust_accuracy"] == found.metrics["robust_accuracy"] == lowest
        files = [file.path for file in client.list_artifacts(run.info.run_id)]
        assert sorted(file.rpartition(".")[2] for file in files) == ["html", "json"]
        assert found.artifacts["json"].content["suite"] == "quick"
        assert [file.path for file in client.list_logged_model_artifacts(logged.model_id) if "report-" in file.path]
    ranked = mlflow.search_logged_models(
        order_by=[{"field_name": "metrics.robust_accuracy", "ascending": False}], output_format="list"
    )
    assert [model.name for model in ranked] == ["strong", "weak"]
    for model in ranked:
        (robust,) = [metric for metric in model.metrics if metric.key == "robust_accuracy"]
        assert (robust.value, robust.dataset_name) == (results[model.model_id], "digits")
    assert results[ranked[0].model_id] > results[ranked[1].model_id]

    for config, why in (
        ({"step": 3}, "evaluator_config has no 'step'"),
        ({"shape": [1, 7, 7]}, "images have 64 values"),
    ):
        with pytest.raises(MlflowException, match="could not be evaluated by any"):
            mlflow.models.evaluate(
                ranked[0].model_uri,
                data,
                model_type="classifier",
                evaluators="dircluster",
                evaluator_config=config,
            )
        assert why in caplog.text
