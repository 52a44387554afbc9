"""Accuracies of an evaluation as metrics of a run and of the logged model, with the data set they are of."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.entities import Dataset, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from dircluster.config import DataConfig
from dircluster.evaluation.results import headline, images_of, name_of

SHA_TAG = "dircluster.sha256"
"""Of a model version: the digest of the folder it was registered from."""


def versions_with(client: MlflowClient, sha: str) -> list[ModelVersion]:
    """The registered versions of the defense whose folder has the digest ``sha``."""
    return list(client.search_model_versions(f"tags.`{SHA_TAG}` = '{sha}'"))


def flags_of(verdict: Sequence[Mapping[str, Any]]) -> int | None:
    """How many questions of a verdict are flagged; None where it was not asked."""
    return sum(not row["passed"] for row in verdict) if verdict else None


def accuracies(rows: Sequence[Mapping[str, Any]], norm: str, flags: int | None = None) -> dict[str, float]:
    """By name: robust_accuracy, its lower bound and natural_accuracy, by which defenses rank, and one for each row."""
    found = headline(rows, norm) | by_row(rows)
    return found if flags is None else found | {"verdict/flags": float(flags)}


def by_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The accuracy of each row, by its name."""
    return {f"test/{name_of(row)}": row["accuracy"] for row in rows}


def dataset_of(name: str, fingerprint: str, source: str) -> Dataset:
    """The data set as MLflow knows it."""
    return Dataset(name, fingerprint[:32], "local", json.dumps({"uri": source}))


def judged_on(data: DataConfig, fingerprint: str, rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """The images that ``rows`` are of, so that accuracies on others are not taken for theirs."""
    return dataset_of(f"{data.name}, {images_of(rows[0])}", fingerprint, data.uri or data.name)


def log_accuracies(
    client: MlflowClient, run_id: str, values: Mapping[str, float], dataset: Dataset, model_id: str | None = None
) -> None:
    """Record ``values``, accuracies on ``dataset``, in the run, and in the logged model where one is given."""
    now = int(time.time() * 1000)
    known: dict[str, Any] = {"model_id": model_id, "dataset_name": dataset.name, "dataset_digest": dataset.digest}
    client.log_batch(run_id, [Metric(name, value, now, 0, run_id=run_id, **known) for name, value in values.items()])
