"""Records on their way to MLflow: what it will never accept is said, and does not block what comes after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient

from dircluster.cluster.tracking import jobs
from dircluster.cluster.tracking.jobs import Child, JobRecord, Refusals, Refused, open_job
from dircluster.cluster.tracking.tracker import MlflowTracker, newest_picture
from dircluster.evaluation.sweep_table import Trial
from dircluster.presets import preset
from tests.unit.cluster.conftest import Clock


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A record that is made once: MLflow takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('record') / 'mlflow.db'}"


def test_what_is_refused_is_said_and_does_not_block(tmp_path: Path) -> None:
    got: list[int] = []
    lines: list[str] = []
    down = [ConnectionError("no server"), Refused("parameter changed\nsecond line")]

    def record() -> None:
        if down:
            raise down.pop(0)

    tracker = MlflowTracker(JobRecord(f"sqlite:///{tmp_path / 'mlflow.db'}", "0", "run", "runs", 120.0), lines.append)
    tracker.queue.put(record)
    tracker.queue.put(lambda: got.append(1))
    tracker.close()
    assert got == [1]
    assert lines == [
        "MLflow does not answer (ConnectionError); keeping records until it does",
        "MLflow refused a record: parameter changed",
        "MLflow answers again",
    ]


def test_points_outlive_a_database_that_fails_over(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client, log_batch = MlflowClient(uri), MlflowClient.log_batch
    experiment = client.create_experiment("failover", artifact_location=str(tmp_path / "artifacts"))
    job = JobRecord(uri, experiment, client.create_run(experiment).info.run_id, "runs", 120.0)
    away = [MlflowException(words, BAD_REQUEST) for words in ("connection already closed", "read-only transaction")]

    def answer(*words: Any, **named: Any) -> Any:
        if away:
            raise away.pop()
        return log_batch(*words, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", answer)
    lines: list[str] = []
    tracker = MlflowTracker(job, lines.append)
    record = tracker.stage("dir", "dir-1", {"dir.alpha": 1})  # whose settings meet the first of them
    record.metrics({"loss": 0.5}, 1)
    tracker.close()
    (run,) = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{job.run_id}'")
    assert (run.data.params, run.data.metrics["loss"]) == ({"dir.alpha": "1"}, 0.5)
    assert [line for line in lines if "refused" in line] == []


def test_what_no_database_takes_is_given_up_after_a_minute(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "time", clock)
    refusals = Refusals()

    def answered(code: int | None) -> str:
        try:
            with refusals():
                if code is not None:
                    raise MlflowException("value too long", code)
        except (MlflowException, Refused) as error:
            return type(error).__name__
        return ""

    for between in (None, TEMPORARILY_UNAVAILABLE):  # after another answer the minute begins again
        assert answered(BAD_REQUEST) == "MlflowException"
        clock.sleep(jobs.DOUBT - 1)
        assert answered(BAD_REQUEST) == "MlflowException"
        assert answered(between) == ("MlflowException" if between else "")
        clock.sleep(jobs.DOUBT)
    for _ in range(2):  # records after it have a minute of their own
        assert answered(BAD_REQUEST) == "MlflowException"
        clock.sleep(jobs.DOUBT)
        assert answered(BAD_REQUEST) == "Refused"
    assert answered(INVALID_PARAMETER_VALUE) == "Refused"


def test_a_trial_that_mlflow_will_never_take_does_not_block_the_ones_after_it(uri: str, tmp_path: Path) -> None:
    usual = preset("digits_smoke")
    tracking = replace(usual.tracking, uri=uri, experiment="trials")
    run = replace(usual, storage=replace(usual.storage, uri=str(tmp_path / "runs")), tracking=tracking)
    sweep = open_job(run, {}, sweep={"space": "some", "varied": ["dir.alpha"], "seeds": 1})
    MlflowClient(uri).delete_experiment(sweep.experiment_id)
    lines: list[str] = []
    got: list[int] = []
    tracker = MlflowTracker(replace(sweep, patience=20.0), lines.append)
    tracker.trial(run, {}, Child(sweep.run_id, "alpha 1", {"dir.alpha": 1.0}), Trial({}, 0, "FINISHED"))
    tracker.queue.put(lambda: got.append(1))
    tracker.close()
    assert got == [1]
    (line,) = lines
    assert line.startswith("MLflow refused a record: tracking.uri ")
    assert line.endswith("Current state is deleted.")


def test_a_picture_that_was_stored_before_its_worker_died_is_not_sent_again(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    experiment = client.create_experiment("pictures", artifact_location=str(tmp_path / "artifacts"))
    parent = client.create_run(experiment).info.run_id
    job = JobRecord(uri, experiment, parent, "runs", 120.0)
    pixels = np.zeros((4, 4, 3), np.uint8)

    def recorded(*steps: int) -> str:
        tracker = MlflowTracker(job, print)
        record = tracker.stage("dir", "dir-1", {})
        for step in steps:
            record.picture("restored", pixels, step)
        record.end("KILLED")
        tracker.close()
        (run,) = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")
        return run.info.run_id

    run = recorded(20)
    client.log_image(run, pixels, key="restored", step=40, synchronous=True)  # and the worker dies
    assert newest_picture(client, run) == 40
    assert recorded(40, 60) == run
    files = [file.path for file in client.list_artifacts(run, "images") if file.path.endswith(".webp")]
    assert sorted(file.split("+")[2] for file in files) == ["20", "40", "60"]


def test_results_of_other_files_under_the_same_settings_replace_those_on_record(uri: str, tmp_path: Path) -> None:
    client = MlflowClient(uri)
    experiment = client.create_experiment("results", artifact_location=str(tmp_path / "artifacts"))
    run = client.create_run(experiment).info.run_id
    row = {"defense": "dir", "attack": "none", "randomness": "fresh"}
    for accuracy in (0.5, 0.5, 0.25):
        tracker = MlflowTracker(JobRecord(uri, experiment, run, "runs", 120.0), print)
        tracker.results([{**row, "accuracy": accuracy}], tmp_path)
        tracker.close()
    (name,) = client.get_run(run).data.metrics
    assert client.get_run(run).data.metrics[name] == 0.25
    assert [point.value for point in client.get_metric_history(run, name)] == [0.5, 0.25]


def test_a_stage_that_is_reused_keeps_the_time_at_which_it_finished(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiment = client.create_experiment("stages", artifact_location=str(tmp_path / "artifacts"))
    job = JobRecord(uri, experiment, client.create_run(experiment).info.run_id, "runs", 120.0)

    def ended(*new: int) -> Any:
        """What is on record once a job has sent what was late, a point of step 1, and trained ``new`` steps."""
        tracker = MlflowTracker(job, print)
        record = tracker.stage("target", "target-1", {})
        record.resend([["loss", 0.5, 1000, 1]], {})
        for step in new:
            record.metrics({"loss": 0.5}, step)
        record.end("FINISHED")
        tracker.close()
        (run,) = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{job.run_id}'")
        assert run.info.status == "FINISHED"
        return run.info.end_time

    first = ended()
    assert ended() == first
    assert ended(2) > first
