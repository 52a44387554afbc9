"""Finished defenses in MLflow's model registry: safetensors and a script, no pickle."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from dircluster.cluster.storage import copy, open_path
from dircluster.cluster.tracking.jobs import JobRecord, default_uri
from dircluster.config import ConfigError, RunConfig, first_line
from dircluster.training import checkpoint

ALIAS = "champion"
TRACKING = "MLFLOW_TRACKING_URI"
REQUIREMENTS = ["dircluster", "torch", "timm", "safetensors", "numpy"]


def register(job: JobRecord, config: RunConfig, folder: Path, card: str) -> str:
    """Register the defense in ``folder`` as ``DEFENSE-NAME``, with ``card``, as champion; -> its models:/ URI."""
    name, data = f"{config.defense}-{config.name}", config.data
    client = MlflowClient(job.uri)
    sha = checkpoint.digest(folder) or ""
    for version in _versions(client, name):
        if version.tags.get("dircluster.sha256") == sha:
            client.set_registered_model_alias(name, ALIAS, version.version)
            return f"models:/{name}@{ALIAS}"
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, data.channels, data.height, data.width))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, data.classes))]),
    )
    with _quiet(), _tracking(job.uri), mlflow.start_run(run_id=job.run_id, log_system_metrics=False):
        logged = mlflow.pyfunc.log_model(
            name="defense",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"checkpoint": str(folder)},
            signature=signature,
            pip_requirements=REQUIREMENTS,
            registered_model_name=name,
            metadata={"sha256": sha},
        )
    version = str(logged.registered_model_version)
    client.update_model_version(name, version, description=card)
    client.set_model_version_tag(name, version, "dircluster.sha256", sha)
    client.set_registered_model_alias(name, ALIAS, version)
    return f"models:/{name}@{ALIAS}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow warns of what is meant here (no input example) and announces what the caller prints anyway."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        output = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _tracking(uri: str | None) -> Iterator[None]:
    """MLflow looks an alias up in its global store, whatever its arguments say."""
    if uri is None:
        yield
        return
    before = os.environ.get(TRACKING)  # set_tracking_uri writes it
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before or "")
        if before is None:
            os.environ.pop(TRACKING, None)


def _versions(client: MlflowClient, name: str) -> list[mlflow.entities.model_registry.ModelVersion]:
    return list(client.search_model_versions(f"name='{name}'"))


def fetch(uri: str, tracking_uri: str | None = None) -> Path:
    """Download a registered defense; -> the folder of its checkpoint. Raises ConfigError where it is not to be had.

    Without ``tracking_uri`` and MLFLOW_TRACKING_URI, the store of the embedded default, runs/mlflow.db, is asked.
    """
    embedded = Path("runs/mlflow.db").resolve()
    if tracking_uri is None and TRACKING not in os.environ and embedded.exists():
        tracking_uri = f"sqlite:///{embedded}"
    try:
        with _quiet(), _tracking(tracking_uri):
            local = mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(prefix="dircluster-"))
    except (MlflowException, OSError) as error:
        raise ConfigError(f"{uri} cannot be fetched: {first_line(error)}") from error
    folders = sorted(Path(local).glob(f"**/{checkpoint.COMMIT}"))
    if not folders:
        raise ConfigError(f"{uri} is not a model that dircluster registered: it holds no checkpoint")
    return folders[0].parent


def reachable(uri: str, config: RunConfig) -> str:
    """``uri``; where it names a registered model, the folder in ``config.storage`` that it is fetched into for all.

    Raises ConfigError where it is not to be had.
    """
    if not uri.startswith("models:/"):
        return uri
    folder = fetch(uri, default_uri(config))
    kept = open_path(config.storage.uri, config.storage) / "given" / str(checkpoint.digest(folder))[:12]
    if checkpoint.digest(kept) is None:
        copy(folder, kept)
    return str(kept)
