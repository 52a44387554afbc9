"""The record of a job in MLflow: one parent run, one child a stage, found again by tags when the job continues."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.entities import Dataset, DatasetInput, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from numpy.typing import NDArray
from torch import Tensor

from dircluster.cluster.outbox import Outbox, Refused
from dircluster.cluster.storage import is_remote
from dircluster.config import ConfigError, RunConfig, digest, flatten, local_path, refuse_secret, to_dict
from dircluster.evaluation.ablation import Trial

JOB_TAG, FOLDER_TAG, PICTURE_TAG = "dircluster.job", "dircluster.folder", "dircluster.pictures_until"
ERROR_TAG, BEST_TAG, SWEEP_TAG = "dircluster.error", "dircluster.best", "dircluster.sweep"
TRAINING_VIEW = "custom_model_development"  # the UI opens on curves instead of language-model traces
MLFLOW_EXPERIMENT_KIND = "mlflow.experimentKind"
PERMANENT = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"}
POINTS_A_REQUEST, PARAMS_A_REQUEST = 1000, 100


def default_uri(config: RunConfig) -> str:
    """``tracking.uri``, or MLFLOW_TRACKING_URI, or an SQLite file in the storage folder.

    Raises ConfigError where it holds a password, or where there is none and storage is no folder.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is not None:
        refuse_secret("MLFLOW_TRACKING_URI", uri)
        return uri
    if is_remote(config.storage.uri):
        raise ConfigError(
            "tracking.uri is missing: with storage in s3:// give the address of an MLflow server (or set"
            " MLFLOW_TRACKING_URI), or keep no record with --tracking.no-enabled"
        )
    return f"sqlite:///{local_path(config.storage.uri).resolve() / 'mlflow.db'}"


def _storage_name(config: RunConfig) -> str:
    uri = config.storage.uri
    return uri.rstrip("/") if is_remote(uri) else str(local_path(uri).resolve())


@dataclass(frozen=True)
class Child:
    """What a run in a sweep is to it: a trial, or what trials share."""

    sweep: str
    """The id of the sweep's run."""
    name: str
    params: Mapping[str, Any]
    """What varies: its only parameters, so that views over them work at once."""
    shared: bool = False
    """Stands beside the sweep, not below it: MLflow's views show only the metrics that all compared runs have."""


@dataclass(frozen=True)
class JobRecord:
    """Where a job is recorded, as plain data that can be sent to a worker."""

    uri: str
    experiment_id: str
    run_id: str
    storage: str
    patience: float


def open_job(
    config: RunConfig,
    tags: Mapping[str, str],
    *,
    fresh: bool = False,
    sweep: Mapping[str, Any] | None = None,
    child: Child | None = None,
) -> JobRecord:
    """Begin the parent run of a job, or continue the newest one with the same settings.

    With ``sweep``, what it varies, it is the parent of trials; as ``child`` it belongs to one. Raises ConfigError where
    the tracking server does not answer.
    """
    uri = default_uri(config)
    job = _job(config, sweep, child)
    tags = {**tags, JOB_TAG: job}
    if child is not None:
        tags[SWEEP_TAG if child.shared else MLFLOW_PARENT_RUN_ID] = child.sweep
    params, name = flatten(config.identity), f"{config.name}-seed{config.seed}"
    if sweep is not None:
        params = {**{n: v for n, v in params.items() if n not in sweep["varied"]}, **sweep}
        name = f"{config.name}-{sweep['space']}"
    if child is not None:
        params, name = dict(child.params), child.name
    try:
        client = MlflowClient(uri)
        experiment = _experiment(client, config, uri)
        runs = [] if fresh else _search(client, experiment, JOB_TAG, job)
        if runs:
            run_id = runs[0]
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            client.log_text(run_id, json.dumps(to_dict(config), indent=1), "config.json")
        _params(client, run_id, params)
        for tag, value in tags.items():
            client.set_tag(run_id, tag, value)
    except Exception as error:  # MLflow raises what its transport raises
        raise ConfigError(f"tracking.uri {uri!r} cannot be used: {str(error).strip().splitlines()[0]}") from error
    return JobRecord(uri, experiment, run_id, _storage_name(config), config.tracking.patience)


def _job(config: RunConfig, sweep: Mapping[str, Any] | None = None, child: Child | None = None) -> str:
    """What tells a job from others, so that it is found again."""
    plain = {**config.identity, "name": config.name, "storage": _storage_name(config)}
    if sweep is not None:
        plain["sweep"] = sweep
    if child is not None:
        plain["child"] = dataclasses.asdict(child)
    return digest(plain)[:16]


def _experiment(client: MlflowClient, config: RunConfig, uri: str) -> str:
    found = client.get_experiment_by_name(config.tracking.experiment)
    if found is not None:
        return str(found.experiment_id)
    artifacts = f"{_storage_name(config)}/artifacts" if "://" not in uri or uri.startswith("sqlite") else None
    tags = {MLFLOW_EXPERIMENT_KIND: TRAINING_VIEW}
    return str(client.create_experiment(config.tracking.experiment, artifacts, tags))


def _search(client: MlflowClient, experiment: str, tag: str, value: str) -> list[str]:
    quoted = value.replace("'", "\\'")
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{quoted}'", order_by=["attributes.start_time DESC"])
    return [run.info.run_id for run in runs]


def _params(client: MlflowClient, run_id: str, flat: Mapping[str, Any]) -> None:
    params = [Param(name, str(value)[:500]) for name, value in flat.items()]
    for start in range(0, len(params), PARAMS_A_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_A_REQUEST])


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code in PERMANENT:
            raise Refused(str(error)) from error
        raise


class MlflowTracker:
    """Records a job's stages and results from whichever process trains."""

    def __init__(self, job: JobRecord, say: Callable[[str], None]) -> None:
        self.job = job
        self.client = MlflowClient(job.uri)
        self.outbox = Outbox(say)
        self.say = say

    def stage(self, name: str, key: str, facts: Mapping[str, Any]) -> StageRun:
        return StageRun(self, name, key, facts)

    def reused(self, name: str, key: str) -> None:
        folder = f"{self.job.storage}/{key}"

        def link() -> None:
            with _refusals():
                runs = _search(self.client, self.job.experiment_id, FOLDER_TAG, folder)
                self.client.set_tag(self.job.run_id, f"dircluster.{name}_run", runs[0] if runs else folder)

        self.outbox.put(link)

    def results(self, rows: list[dict[str, Any]], checkpoint: Path) -> None:
        def log() -> None:
            with _refusals():
                self.client.log_dict(self.job.run_id, {"results": rows}, "results.json")
                columns = {name: [str(row[name]) for row in rows] for name in rows[0]}
                table = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
                self.client.log_text(self.job.run_id, json.dumps(table), "results_table.json")
                now = int(time.time() * 1000)
                known = self.client.get_run(self.job.run_id).data.metrics
                accuracies = {f"test/{r['defense']}/{r['attack']}/{r['masks']}": r["accuracy"] for r in rows}
                points = [Metric(name, value, now, 0) for name, value in accuracies.items() if name not in known]
                self.client.log_batch(self.job.run_id, metrics=points)

        self.outbox.put(log)

    def trial(self, run: RunConfig, tags: Mapping[str, str], child: Child, trial: Trial) -> None:
        """What a trial of the sweep found, in its child run, once."""
        status = {"STOPPED": "KILLED"}.get(trial.status, trial.status)
        values = {"held_out": trial.held_out, "natural": trial.natural, "robust": trial.robust}
        values["seconds"] = trial.seconds or None

        def log() -> None:
            client, now = self.client, int(time.time() * 1000)
            with _refusals():
                runs = _search(client, self.job.experiment_id, JOB_TAG, _job(run, child=child))
                run_id = runs[0] if runs else open_job(run, tags, child=child).run_id
                found = client.get_run(run_id)
                if found.info.status == status == "FINISHED" and "robust" in found.data.metrics:
                    return
                new = {n: v for n, v in values.items() if v is not None and found.data.metrics.get(n) != v}
                client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in new.items()])
                if trial.error:
                    client.set_tag(run_id, ERROR_TAG, trial.error[:500])
                elif ERROR_TAG in found.data.tags:
                    client.delete_tag(run_id, ERROR_TAG)
                for stage in _search(client, self.job.experiment_id, MLFLOW_PARENT_RUN_ID, run_id):
                    if client.get_run(stage).info.status == "RUNNING":  # its process is gone
                        client.set_terminated(stage, status)
                client.set_terminated(run_id, status)

        self.outbox.put(log)

    def sweep(self, rows: list[dict[str, str]], files: Mapping[str, bytes], best: str) -> None:
        """The table, the files and the best command of a sweep, in its run."""
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}

        def log() -> None:
            with _refusals():
                self.client.log_text(self.job.run_id, json.dumps(table), "results_table.json")
                with tempfile.TemporaryDirectory() as folder:
                    for name, content in files.items():
                        (Path(folder) / name).write_bytes(content)
                    self.client.log_artifacts(self.job.run_id, folder)
                if best:
                    self.client.set_tag(self.job.run_id, BEST_TAG, best)

        self.outbox.put(log)

    def close(self, hurry: bool = False) -> None:
        """Deliver what is left, for up to ``tracking.patience`` seconds, or ten in a ``hurry``."""
        patience = min(self.job.patience, 10.0) if hurry else self.job.patience
        left = self.outbox.close(patience)
        if left:
            self.say(f"MLflow did not come back within {patience:.0f} s: {left} records are lost")


class StageRun:
    """The child run of one stage. A step that is on record already is not recorded again."""

    def __init__(self, tracker: MlflowTracker, name: str, key: str, facts: Mapping[str, Any]) -> None:
        self.tracker, self.name = tracker, name
        self.folder = f"{tracker.job.storage}/{key}"
        self.facts = dict(facts)
        self.run_id = ""
        self.until: dict[str, int] = {}
        self.pictures_until = -1
        self.points: list[Metric] = []
        self.pictures: dict[str, NDArray[np.uint8]] = {}
        self.monitor: Any = None
        tracker.outbox.put(self._open)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.points += [Metric(name, value, now, step) for name, value in values.items()]
        self.tracker.outbox.put(self._send)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        key = f"{step}/{name}"
        self.pictures[key] = pixels

        def log() -> None:
            if step > self.pictures_until:
                with _refusals():
                    self.tracker.client.log_image(self.run_id, pixels, key=name, step=step, synchronous=True)
                    self.tracker.client.set_tag(self.run_id, PICTURE_TAG, step)
                self.pictures_until = step
            self.pictures.pop(key, None)

        self.tracker.outbox.put(log)

    def unsent(self) -> tuple[list[list[Any]], dict[str, Tensor]]:
        points = [[point.key, point.value, point.timestamp, point.step] for point in list(self.points)]
        return points, {key: torch.from_numpy(pixels) for key, pixels in dict(self.pictures).items()}

    def resend(self, points: list[list[Any]], pictures: Mapping[str, Tensor]) -> None:
        self.points += [Metric(str(name), float(value), int(when), int(step)) for name, value, when, step in points]
        self.tracker.outbox.put(self._send)
        for key, pixels in pictures.items():
            step, _, name = key.partition("/")
            self.picture(name, pixels.numpy(), int(step))

    def end(self, status: str) -> None:
        def log() -> None:
            if self.monitor is not None:
                self.monitor.finish()
                self.monitor = None
            with _refusals():
                self.tracker.client.set_terminated(self.run_id, status)

        self.tracker.outbox.put(log)

    def _open(self) -> None:
        client, job = self.tracker.client, self.tracker.job
        with _refusals():
            runs = _search(client, job.experiment_id, FOLDER_TAG, self.folder)
            if runs:
                self.run_id = runs[0]
                client.update_run(self.run_id, status="RUNNING")
                known = client.get_run(self.run_id).data
                for name in known.metrics:
                    if not name.startswith("system/"):
                        self.until[name] = max(m.step for m in client.get_metric_history(self.run_id, name))
                self.pictures_until = int(known.tags.get(PICTURE_TAG, "-1"))
            else:
                tags = {MLFLOW_PARENT_RUN_ID: job.run_id, MLFLOW_RUN_NAME: self.name, FOLDER_TAG: self.folder}
                tags["dircluster.stage"] = self.name
                self.run_id = client.create_run(job.experiment_id, run_name=self.name, tags=tags).info.run_id
            _params(client, self.run_id, self.facts)
        with contextlib.suppress(Exception):  # a nicety: training never depends on it
            self.monitor = SystemMetricsMonitor(
                self.run_id, sampling_interval=2, samples_before_logging=2, resume_logging=True, tracking_uri=job.uri
            )
            self.monitor.start()

    def _send(self) -> None:
        while batch := self.points[:POINTS_A_REQUEST]:
            new = [point for point in batch if point.step > self.until.get(point.key, -1)]
            try:
                if new:
                    with _refusals():
                        self.tracker.client.log_batch(self.run_id, metrics=new, synchronous=True)
            except Refused:
                del self.points[: len(batch)]
                raise
            del self.points[: len(batch)]


def record_evaluation(config: RunConfig, facts: dict[str, Any], found: dict[str, Any], files: list[Path]) -> str:
    """A run of its own for a judgement: settings, accuracies, flags, and the report's files; -> its id.

    Raises ConfigError where the tracking server does not answer.
    """
    settings = {"defense": facts["defense"], **flatten({"evaluation": to_dict(config.evaluation)})}
    settings |= flatten({"attack": to_dict(config.attack), "seed": config.seed})
    uri = default_uri(config)
    tags = {"dircluster.commit": facts["commit"], "dircluster.data": facts["data"]}
    try:
        client = MlflowClient(uri)
        experiment = _experiment(client, config, uri)
        run_id = str(
            client.create_run(experiment, run_name=f"judge-{config.name}-{found['suite']}", tags=tags).info.run_id
        )
        _params(client, run_id, settings)
        now = int(time.time() * 1000)
        values = {f"test/{r['defense']}/{r['attack']}/{r['masks']}": r["accuracy"] for r in found["rows"]}
        if found["verdict"]:
            values["verdict/flags"] = float(sum(row["passed"] is False for row in found["verdict"]))
        client.log_batch(run_id, metrics=[Metric(name, value, now, 0) for name, value in values.items()])
        for file in files:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / file.name
                copy.write_bytes(file.read_bytes())
                client.log_artifact(run_id, str(copy))
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # MLflow raises what its transport raises
        raise ConfigError(f"tracking.uri {uri!r} cannot be used: {str(error).strip().splitlines()[0]}") from error
    return run_id


def finish_job(job: JobRecord, status: str) -> None:
    """Mark the parent run FINISHED, FAILED or KILLED, as far as the server answers."""
    with contextlib.suppress(Exception):
        MlflowClient(job.uri).set_terminated(job.run_id, status)


def log_dataset(job: JobRecord, name: str, fingerprint: str, source: str) -> None:
    """Tell MLflow which data the job saw."""
    with contextlib.suppress(Exception):
        dataset = Dataset(name, fingerprint[:32], "local", json.dumps({"uri": source}))
        MlflowClient(job.uri).log_inputs(job.run_id, [DatasetInput(dataset, [])])


def log_files(job: JobRecord, texts: Mapping[str, str]) -> None:
    """Keep small texts with the parent run."""
    client = MlflowClient(job.uri)
    for name, text in texts.items():
        client.log_text(job.run_id, text, name)
