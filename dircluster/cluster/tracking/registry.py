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
from typing import Any

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from dircluster.cluster.storage import copy, open_path, temporary_folder, troubles
from dircluster.cluster.tracking import place
from dircluster.cluster.tracking.accuracies import SHA_TAG, flags_of, judged_on, log_accuracies, versions_with
from dircluster.cluster.tracking.champion import CANDIDATE, CHAMPION, champion_of, crown, evidence_of, note
from dircluster.cluster.tracking.jobs import JobRecord, default_uri
from dircluster.cluster.tracking.packaging import pack
from dircluster.cluster.tracking.sqlite_record import file_of
from dircluster.config import ConfigError, RunConfig, first_line, named_line
from dircluster.evaluation.results import headline
from dircluster.training import checkpoint

DATASET_TAG, THREAT_TAG = "dircluster.dataset", "dircluster.threat"
THREATS = {"linf": "Linf", "l2": "L2"}
"""Threat models by the names that RobustBench has for them."""


def register(job: JobRecord, config: RunConfig, folder: Path, card: str, outcome: dict[str, Any]) -> tuple[str, str]:
    """Register the defense in ``folder`` as ``DEFENSE-NAME``, with ``card`` and the accuracies of ``outcome``.

    -> its models:/ URI, and a line on whether it is champion. It is candidate in any case.
    """
    name = f"{config.defense}-{config.name}"
    client = MlflowClient(job.uri)
    sha = checkpoint.digest(folder) or ""
    version = next((each for each in versions_with(client, sha) if each.name == name), None)
    if version is None:
        version = _log(job, client, config, folder, card, sha, outcome)
    if (found := evidence_of(outcome["results"], config.attack.norm, outcome["data"])) is not None:
        version = note(client, version, found)
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    line = crown(client, version)
    champion = champion_of(client, name)
    is_champion = champion is not None and champion.version == version.version
    return f"models:/{name}@{CHAMPION if is_champion else CANDIDATE}", line


def _log(
    job: JobRecord,
    client: MlflowClient,
    config: RunConfig,
    folder: Path,
    card: str,
    sha: str,
    outcome: dict[str, Any],
) -> ModelVersion:
    """A new version, and its accuracies as metrics of the logged model."""
    name, data = f"{config.defense}-{config.name}", config.data
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype("float32"), (-1, data.channels, data.height, data.width))]),
        outputs=Schema([TensorSpec(np.dtype("float32"), (-1, data.classes))]),
    )
    shape = (data.channels, data.height, data.width)
    example = np.random.default_rng(0).random((2, *shape)).round(3).astype(np.float32)
    with (
        tempfile.TemporaryDirectory() as packed,
        _quiet(),
        _tracking(job.uri),
        mlflow.start_run(run_id=job.run_id, log_system_metrics=False),
    ):
        code, requirements = pack(config, Path(packed))
        logged = mlflow.pyfunc.log_model(
            name="defense",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"checkpoint": str(folder)},
            signature=signature,
            pip_requirements=requirements,
            code_paths=code,
            input_example=example,
            registered_model_name=name,
            metadata={"sha256": sha},
        )
    version = str(logged.registered_model_version)
    client.update_model_version(name, version, description=card)
    tags = {SHA_TAG: sha, DATASET_TAG: data.name, THREAT_TAG: THREATS[config.attack.norm]}
    for tag, value in tags.items():
        client.set_model_version_tag(name, version, tag, value)
    values = headline(outcome["results"], config.attack.norm)  # those of the rows are in the run already
    dataset = judged_on(data, outcome["data"], outcome["results"])
    log_accuracies(client, job.run_id, values, dataset, logged.model_id)
    return client.get_model_version(name, version)


def judged(config: RunConfig, sha: str, found: dict[str, Any], data: str) -> list[str]:
    """Note an evaluation with the registered versions of the defense whose folder has the digest ``sha``.

    ``found`` is the report as plain data, ``data`` the digest of the data set. -> a line for each version: whether it
    is champion now.
    """
    client = MlflowClient(default_uri(config))
    evidence = evidence_of(found["rows"], config.attack.norm, data, flags_of(found["verdict"]))
    versions = [] if evidence is None else versions_with(client, sha)
    return [f"{each.name}: {crown(client, note(client, each, evidence))}" for each in versions if evidence is not None]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """MLflow warns of what is meant here and announces what the caller prints anyway."""
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
def _tracking(uri: str) -> Iterator[None]:
    """MLflow looks an alias up in its global store, whatever its arguments say."""
    before = os.environ.get(place.VARIABLE)  # set_tracking_uri writes it
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before or "")
        if before is None:
            os.environ.pop(place.VARIABLE, None)


def fetch(uri: str, tracking_uri: str | None = None) -> Path:
    """Download a registered defense; -> the folder of its checkpoint. Raises ConfigError where it is not to be had.

    Without ``tracking_uri`` and MLFLOW_TRACKING_URI, the store of the embedded default, runs/mlflow.db, is asked.
    """
    store = _store(tracking_uri)
    missing = _missing(store)
    if missing is not None:
        raise ConfigError(f"{uri} cannot be fetched: there is no record {missing} that could know it")
    try:
        with _quiet(), _tracking(store):
            local = mlflow.artifacts.download_artifacts(uri, dst_path=str(temporary_folder()))
    except Exception as error:  # MLflow raises what its database and its transport raise
        raise ConfigError(f"{uri} cannot be fetched: {first_line(error)}") from error
    folders = sorted(Path(local).glob(f"**/{checkpoint.COMMIT}"))
    if not folders:
        raise ConfigError(f"{uri} is not a model that dircluster registered: it holds no checkpoint")
    return folders[0].parent


def _store(tracking_uri: str | None) -> str:
    """Where models are looked up: ``tracking_uri``, MLFLOW_TRACKING_URI, or the embedded default.

    Never MLflow's own default: a file in whatever folder the person stands in, made by asking it.
    """
    return tracking_uri or place.from_environment() or f"sqlite:///{Path('runs/mlflow.db').resolve()}"


def _missing(store: str) -> Path | None:
    """The file of an SQLite store that is not there; MLflow would make it."""
    file = file_of(store)
    return None if file is None or file.exists() else file


def find_champion(names: list[str], dataset: str, threat: str, tracking_uri: str | None = None) -> str | None:
    """URI of the first champion under one of ``names`` that is of this data set and threat; None where there is none.

    Raises ConfigError where the tracking server does not answer, or the store that was named is not there.
    """
    store = _store(tracking_uri)
    missing = _missing(store)
    if missing is not None and (tracking_uri or place.from_environment()):
        raise ConfigError(f"there is no record {missing} that could know a champion")
    if missing is not None:
        return None  # nothing was recorded here yet
    try:
        client = MlflowClient(store)
        for name in names:
            if not client.search_registered_models(f"name = '{name}'"):
                continue
            version = champion_of(client, name)
            if version is not None and (version.tags.get(DATASET_TAG), version.tags.get(THREAT_TAG)) == (
                dataset,
                threat,
            ):
                return f"models:/{name}@{CHAMPION}"
    except Exception as error:  # MLflow raises what its transport raises
        raise ConfigError(f"the MLflow store cannot be used: {first_line(error)}") from error
    return None


def reachable(uri: str, config: RunConfig) -> str:
    """The folder in ``config.storage`` that the registered model ``uri`` is fetched into for all.

    Raises ConfigError where it is not to be had.
    """
    folder = fetch(uri, default_uri(config))
    kept = open_path(config.storage.uri, config.storage) / "given" / str(checkpoint.digest(folder))[:12]
    try:
        if not checkpoint.is_sound(kept):
            copy(folder, kept)
    except troubles() as error:
        raise ConfigError(f"{uri} cannot be kept in storage.uri {config.storage.uri!r}: {named_line(error)}") from error
    return str(kept)
