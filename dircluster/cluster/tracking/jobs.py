"""Runs in MLflow: a job's parent run, found again by its tags, and what belongs to it at its end."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import math
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlflow.entities import DatasetInput, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from dircluster.cluster.storage import is_remote
from dircluster.cluster.tracking import place
from dircluster.cluster.tracking.accuracies import (
    accuracies,
    dataset_of,
    flags_of,
    judged_on,
    log_accuracies,
    versions_with,
)
from dircluster.cluster.tracking.owners import BEAT_TAG, OWNER_TAG, close_abandoned, this_process
from dircluster.cluster.tracking.sqlite_record import MOVED_TAG, opening
from dircluster.config import ConfigError, RunConfig, digest, first_line, flatten, local_path, to_dict

JOB_TAG, FOLDER_TAG, TARGET_TAG = "dircluster.job", "dircluster.folder", "dircluster.target_sha256"
ERROR_TAG, BEST_TAG, SWEEP_TAG = "dircluster.error", "dircluster.best", "dircluster.sweep"
TRAINING_VIEW = "custom_model_development"  # the UI opens on curves instead of language-model traces
MLFLOW_EXPERIMENT_KIND = "mlflow.experimentKind"
PERMANENT = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
DOUBTFUL, DOUBT = "BAD_REQUEST", 60.0
"""What MLflow says of a value that its database will never take, and of a database that fails over: such an answer
counts for good once it has been the only one for so many seconds."""
POINTS_A_REQUEST, PARAMS_A_REQUEST = 1000, 100


def default_uri(config: RunConfig) -> str:
    """``tracking.uri``, or MLFLOW_TRACKING_URI, or an SQLite file in the storage folder.

    Raises ConfigError where it holds a password, or where there is none and storage is no folder.
    """
    uri = place.named(config)
    if uri:
        return uri
    if is_remote(config.storage.uri):
        raise ConfigError(
            "tracking.uri is missing: with storage in s3:// give the address of an MLflow server (or set"
            " MLFLOW_TRACKING_URI), or keep no record with --tracking.no-enabled"
        )
    return f"sqlite:///{local_path(config.storage.uri).resolve() / 'mlflow.db'}"


def storage_name(config: RunConfig) -> str:
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
    owner: str = ""
    """The process that the job is, see owners."""
    before: str = ""
    """Whose the run was while it was RUNNING, as far as is known; empty where nobody worked on it."""


def open_job(
    config: RunConfig,
    tags: Mapping[str, str],
    *,
    fresh: bool = False,
    sweep: Mapping[str, Any] | None = None,
    child: Child | None = None,
) -> JobRecord:
    """Begin the parent run of a job, or continue the newest one with the same settings.

    With ``sweep``, its space, what it varies and how many seeds, it is the parent of trials; as ``child`` it belongs to
    one. Raises ConfigError where the tracking server does not answer.
    """
    uri = default_uri(config)
    job, owner = job_digest(config, sweep, child), this_process()
    tags = {**_mlflow_tags(tags), **tags, JOB_TAG: job, OWNER_TAG: owner}
    if child is not None:
        tags[SWEEP_TAG if child.shared else MLFLOW_PARENT_RUN_ID] = child.sweep
    params, name, before = flatten(config.identity), f"{config.name}-seed{config.seed}", ""
    if sweep is not None:
        params = {**{n: v for n, v in params.items() if n not in sweep["varied"]}, **sweep}
        last = config.seed + sweep["seeds"] - 1
        seeds = f"seed{last}" if last == config.seed else f"seeds{config.seed}-{last}"
        name = f"{config.name}-{sweep['space']}-{seeds}"
    if child is not None:
        params, name = dict(child.params), child.name
    try:
        client, experiment = connect(config, uri)
        close_abandoned(client, [experiment])
        run_id = "" if fresh else _known(client, experiment, config, sweep, child)
        if run_id:
            known = client.get_run(run_id)
            before = known.data.tags.get(OWNER_TAG, "") if known.info.status == "RUNNING" else ""
            if BEAT_TAG in known.data.tags:  # of a process before this one
                client.delete_tag(run_id, BEAT_TAG)
            for tag, value in tags.items():
                client.set_tag(run_id, tag, value)
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            client.log_text(run_id, json.dumps(to_dict(config), indent=1), "config.json")
        log_params(client, run_id, params)
    except Exception as error:  # MLflow raises what its transport raises
        raise ConfigError(f"tracking.uri {uri!r} cannot be used: {first_line(error)}") from error
    return JobRecord(uri, experiment, run_id, storage_name(config), config.tracking.patience, owner, before)


def _mlflow_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """What MLflow's own pages show of a run: who started what, and from which commit."""
    words = shlex.split(tags["dircluster.command"]) if "dircluster.command" in tags else sys.argv[:1]
    script = next((word for word in words if word.endswith(".py")), words[0])  # of what is longer a page shows the end
    own = {MLFLOW_SOURCE_NAME: script, MLFLOW_SOURCE_TYPE: "LOCAL"}
    with contextlib.suppress(OSError, KeyError):  # a container's user may have no name
        own[MLFLOW_USER] = getpass.getuser()
    if sha := re.match("[0-9a-f]{40}", tags.get("dircluster.commit", "")):
        own[MLFLOW_GIT_COMMIT] = sha[0]
    return own


def _known(
    client: MlflowClient, experiment: str, config: RunConfig, sweep: Mapping[str, Any] | None, child: Child | None
) -> str:
    """The newest run of a job, also of the time before its storage folder was moved; empty where there is none."""
    former = json.loads(client.get_experiment(experiment).tags.get(MOVED_TAG, "[]"))
    for storage in (storage_name(config), *former):
        if runs := search_runs(client, experiment, JOB_TAG, job_digest(config, sweep, child, storage)):
            return runs[0]
    return ""


def job_digest(
    config: RunConfig, sweep: Mapping[str, Any] | None = None, child: Child | None = None, storage: str = ""
) -> str:
    """What tells a job from others, so that it is found again; ``storage`` is where its record lay before."""
    plain = {**config.identity, "name": config.name, "storage": storage or storage_name(config)}
    if sweep is not None:
        plain["sweep"] = sweep
    if child is not None:
        plain["child"] = dataclasses.asdict(child)
    return digest(plain)[:16]


def connect(config: RunConfig, uri: str) -> tuple[MlflowClient, str]:
    """A client of the record at ``uri``, made where there is none yet, and the id of the run's experiment."""
    with opening(uri, storage_name(config)):
        client = MlflowClient(uri)
        return client, experiment_of(client, config, uri)


def experiment_of(client: MlflowClient, config: RunConfig, uri: str) -> str:
    name = config.tracking.experiment
    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = f"{storage_name(config)}/artifacts" if "://" not in uri or uri.startswith("sqlite") else None
        try:
            return str(client.create_experiment(name, artifacts, {MLFLOW_EXPERIMENT_KIND: TRAINING_VIEW}))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another job may have made it meanwhile
            if found is None:
                raise
    return str(found.experiment_id)


def search_runs(client: MlflowClient, experiment: str, tag: str, value: str) -> list[str]:
    """Runs whose ``tag`` is ``value``, the newest first."""
    pattern = value.replace("'", "_")  # MLflow has no form for a quote in a text; to LIKE, _ is any character
    query = f"tags.`{tag}` {'=' if pattern == value else 'LIKE'} '{pattern}'"
    runs = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])
    return [run.info.run_id for run in runs if run.data.tags[tag] == value]


def log_params(client: MlflowClient, run_id: str, flat: Mapping[str, Any]) -> None:
    params = [Param(name, str(value)[:500]) for name, value in flat.items()]
    for start in range(0, len(params), PARAMS_A_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_A_REQUEST])


class Refused(Exception):
    """The server answered, and will never accept this record."""


class Refusals:
    """Tells what MLflow will never accept from what it may accept later, for records that go out one by one."""

    def __init__(self) -> None:
        self._doubtful_since = math.inf

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Raise Refused where trying again is useless, also where ``open_job`` put the answer into words."""
        since, self._doubtful_since = min(self._doubtful_since, time.monotonic()), math.inf
        try:
            yield
        except (MlflowException, ConfigError) as error:
            code = getattr(error.__cause__ if isinstance(error, ConfigError) else error, "error_code", "")
            if code in PERMANENT or (code == DOUBTFUL and time.monotonic() - since >= DOUBT):
                raise Refused(str(error)) from error
            if code == DOUBTFUL:
                self._doubtful_since = since
            raise


def record_evaluation(
    config: RunConfig, facts: dict[str, Any], found: dict[str, Any], files: list[Path], sha: str = ""
) -> str:
    """A run of its own for an evaluation: settings, accuracies, flags, and the report's files; -> its id.

    The accuracies are those of the logged model too, where the defense with the digest ``sha`` is registered.

    Raises ConfigError where the tracking server does not answer.
    """
    settings = {"defense": facts["defense"], **flatten({"evaluation": to_dict(config.evaluation)})}
    settings |= flatten({"attack": to_dict(config.attack), "seed": config.seed})
    uri, run_id = default_uri(config), ""
    tags = {"dircluster.commit": facts["commit"], "dircluster.data": facts["data"], OWNER_TAG: this_process()}
    tags |= _mlflow_tags(tags)
    try:
        client, experiment = connect(config, uri)
        run_id = str(
            client.create_run(experiment, run_name=f"judge-{config.name}-{found['suite']}", tags=tags).info.run_id
        )
        log_params(client, run_id, settings)
        values = accuracies(found["rows"], config.attack.norm, flags_of(found["verdict"]))
        dataset, versions = judged_on(config.data, facts["data"], found["rows"]), versions_with(client, sha)
        client.log_inputs(run_id, [DatasetInput(dataset, [])])
        log_accuracies(client, run_id, values, dataset, versions[0].model_id if versions else None)
        for file in files:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / file.name
                copy.write_bytes(file.read_bytes())
                client.log_artifact(run_id, str(copy))
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # MLflow raises what its transport raises
        with contextlib.suppress(Exception):
            if run_id:
                client.set_terminated(run_id, "FAILED")
        raise ConfigError(f"tracking.uri {uri!r} cannot be used: {first_line(error)}") from error
    return run_id


def record_rows(job: JobRecord, config: RunConfig, fingerprint: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """The accuracies of ``rows`` on the data of that ``fingerprint`` in a run: those that it does not show already.

    Raises ConfigError where the tracking server does not answer.
    """
    try:
        client = MlflowClient(job.uri)
        shown, values = client.get_run(job.run_id).data.metrics, accuracies(rows, config.attack.norm)
        new = {name: value for name, value in values.items() if shown.get(name) != value}
        if new:
            dataset = judged_on(config.data, fingerprint, rows)
            client.log_inputs(job.run_id, [DatasetInput(dataset, [])])
            log_accuracies(client, job.run_id, new, dataset)
    except Exception as error:  # MLflow raises what its transport raises
        raise ConfigError(f"tracking.uri {job.uri!r} cannot be used: {first_line(error)}") from error


def finish_job(job: JobRecord, status: str, say: Callable[[str], None] = lambda line: None) -> None:
    """Mark the parent run FINISHED, FAILED or KILLED; where the server does not answer, ``say`` so: it waited before.

    Whoever looks for runs without a process would call it KILLED later.
    """
    try:
        MlflowClient(job.uri).set_terminated(job.run_id, status)
    except Exception as error:  # whatever MLflow and the network raise
        say(f"MLflow still has run {job.run_id} as RUNNING, which is {status}: {first_line(error)}")


def hand_back(job: JobRecord) -> None:
    """Leave a run to the job whose it was, beside which this one could not be; where it was nobody's it FAILED."""
    if not job.before:
        finish_job(job, "FAILED")
        return
    with contextlib.suppress(Exception):
        client = MlflowClient(job.uri)
        client.set_tag(job.run_id, OWNER_TAG, job.before)
        client.set_tag(job.run_id, BEAT_TAG, f"{time.time():.0f}")  # who is seen by these alone gives the next one


def describe_run(job: JobRecord, text: str) -> None:
    """Show ``text``, Markdown, on the page of the parent run, and below it the newest picture of its stages."""
    client = MlflowClient(job.uri)
    for stage in search_runs(client, job.experiment_id, MLFLOW_PARENT_RUN_ID, job.run_id):
        files = [file.path for file in client.list_artifacts(stage, "images") if file.path.endswith(".png")]
        if files:
            newest = max(files, key=lambda path: int((re.findall(r"\+step\+(\d+)\+", path) or ["-1"])[0]))
            text += f"\n![restored images](get-artifact?path={quote(newest)}&run_uuid={stage})\n"
            break
    client.set_tag(job.run_id, MLFLOW_RUN_NOTE, text)


def log_dataset(job: JobRecord, name: str, fingerprint: str, source: str) -> None:
    """Tell MLflow which data the job saw."""
    with contextlib.suppress(Exception):
        inputs = [DatasetInput(dataset_of(name, fingerprint, source), [])]
        MlflowClient(job.uri).log_inputs(job.run_id, inputs)


def log_target(job: JobRecord, given: Mapping[str, str] | None) -> None:
    """Tag the parent run with the SHA-256 of the target that it was given, where it was."""
    if given is not None:
        with contextlib.suppress(Exception):
            MlflowClient(job.uri).set_tag(job.run_id, TARGET_TAG, given["sha256"])


def log_files(job: JobRecord, texts: Mapping[str, str]) -> None:
    """Keep small texts with the parent run."""
    client = MlflowClient(job.uri)
    for name, text in texts.items():
        client.log_text(job.run_id, text, name)
