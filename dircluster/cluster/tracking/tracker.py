"""Records a job while it runs: one child run a stage, points and pictures delivered off the training thread."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME
from numpy.typing import NDArray
from torch import Tensor

from dircluster.cluster.tracking.accuracies import by_row
from dircluster.cluster.tracking.jobs import (
    BEST_TAG,
    ERROR_TAG,
    FOLDER_TAG,
    JOB_TAG,
    POINTS_A_REQUEST,
    Child,
    JobRecord,
    Refusals,
    Refused,
    job_digest,
    log_params,
    open_job,
    search_runs,
)
from dircluster.cluster.tracking.owners import OWNER_TAG
from dircluster.config import RunConfig, first_line
from dircluster.evaluation.sweep_table import Trial
from dircluster.training.retry import RetryQueue

KEPT = "keeping records until it does"


class MlflowTracker:
    """Records a job's stages and results from whichever process trains."""

    def __init__(self, job: JobRecord, say: Callable[[str], None]) -> None:
        self.job = job
        self.queue: RetryQueue[Callable[[], None]] = RetryQueue(
            self._deliver,
            say,
            complaint=lambda _, error: _complaint(error),
            recovery=lambda _: "MLflow answers again",
            longest_pause=10.0,
        )
        self.refusals = Refusals()
        self.say = say

    @cached_property
    def client(self) -> MlflowClient:
        """Made by the first delivery, off the training thread: a second for a store in SQLite."""
        return MlflowClient(self.job.uri)

    def stage(self, name: str, key: str, facts: Mapping[str, Any]) -> StageRun:
        return StageRun(self, name, key, facts)

    def reused(self, name: str, key: str) -> None:
        folder = f"{self.job.storage}/{key}"

        def link() -> None:
            with self.refusals():
                runs = search_runs(self.client, self.job.experiment_id, FOLDER_TAG, folder)
                self.client.set_tag(self.job.run_id, f"dircluster.{name}_run", runs[0] if runs else folder)

        self.queue.put(link)

    def results(self, rows: list[dict[str, Any]], checkpoint: Path) -> None:
        def log() -> None:
            with self.refusals():
                self.client.log_dict(self.job.run_id, {"results": rows}, "results.json")
                columns = {name: [str(row[name]) for row in rows] for name in rows[0]}
                table = {"columns": list(columns), "data": [list(row) for row in zip(*columns.values(), strict=True)]}
                self.client.log_text(self.job.run_id, json.dumps(table), "results_table.json")
                now = int(time.time() * 1000)
                known = self.client.get_run(self.job.run_id).data.metrics
                new = {name: value for name, value in by_row(rows).items() if known.get(name) != value}
                points = [Metric(name, value, now, 0) for name, value in new.items()]
                self.client.log_batch(self.job.run_id, metrics=points)

        self.queue.put(log)

    def trial(self, run: RunConfig, tags: Mapping[str, str], child: Child, trial: Trial) -> None:
        """What a trial of the sweep found, in its child run, once."""
        status = {"STOPPED": "KILLED"}.get(trial.status, trial.status)
        values = {"held_out": trial.held_out, "natural": trial.natural, "robust": trial.robust}
        values["seconds"] = trial.seconds or None

        def log() -> None:
            client, now = self.client, int(time.time() * 1000)
            with self.refusals():
                runs = search_runs(client, self.job.experiment_id, JOB_TAG, job_digest(run, child=child))
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
                for stage in search_runs(client, self.job.experiment_id, MLFLOW_PARENT_RUN_ID, run_id):
                    if client.get_run(stage).info.status == "RUNNING":  # its process is gone
                        client.set_terminated(stage, status)
                client.set_terminated(run_id, status)

        self.queue.put(log)

    def sweep(self, rows: list[dict[str, str]], files: Mapping[str, bytes], best: str) -> None:
        """The table, the files and the best command of a sweep, in its run."""
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}

        def log() -> None:
            with self.refusals():
                self.client.log_text(self.job.run_id, json.dumps(table), "results_table.json")
                with tempfile.TemporaryDirectory() as folder:
                    for name, content in files.items():
                        file = Path(folder) / name
                        file.parent.mkdir(exist_ok=True)
                        file.write_bytes(content)
                    self.client.log_artifacts(self.job.run_id, folder)
                if best:
                    self.client.set_tag(self.job.run_id, BEST_TAG, best)

        self.queue.put(log)

    def _deliver(self, record: Callable[[], None]) -> None:
        try:
            record()
        except Refused as refusal:
            self.say(f"MLflow refused a record: {first_line(refusal)}")

    def close(self, hurry: bool = False) -> None:
        """Deliver what is left, for up to ``tracking.patience`` seconds, or ten in a ``hurry`` or on a full disk."""
        hurry = hurry or is_full(self.queue.trouble)
        patience = min(self.job.patience, 10.0) if hurry else self.job.patience
        left = self.queue.close(patience)
        if left:
            self.say(f"MLflow did not come back within {patience:.0f} s: {left} records are lost")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, says that a disk or its quota is full: waiting does not mend that."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _complaint(error: Exception) -> str:
    if is_full(error):
        return "the disk under MLflow's record is full: training goes on, and records wait for room until its end"
    return f"MLflow does not answer ({type(error).__name__}); {KEPT}"


def newest_picture(client: MlflowClient, run_id: str) -> int:
    """The newest step whose picture has arrived whole; -1 while there is none.

    Asked of the pictures themselves: whoever dies after one was stored has no time to note that it was. MLflow stores
    the compressed form last.
    """
    files = (file.path for file in client.list_artifacts(run_id, "images"))
    return max((int(m[1]) for file in files if (m := re.search(r"\+step\+(\d+)\+.*\.webp$", file))), default=-1)


class StageRun:
    """The child run of one stage. A step that is on record already is not recorded again."""

    def __init__(self, tracker: MlflowTracker, name: str, key: str, facts: Mapping[str, Any]) -> None:
        self.tracker, self.name = tracker, name
        self.folder = f"{tracker.job.storage}/{key}"
        self.facts = dict(facts)
        self.run_id = ""
        self.until: dict[str, int] = {}
        self.pictures_until = -1
        self.finished: int | None = None
        """When it had finished before, in milliseconds; None where it had not."""
        self.goes_on = False
        self.points: list[Metric] = []
        self.pictures: dict[str, NDArray[np.uint8]] = {}
        self.monitor: Any = None
        tracker.queue.put(self._open)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now, self.goes_on = int(time.time() * 1000), True
        self.points += [Metric(name, value, now, step) for name, value in values.items()]
        self.tracker.queue.put(self._send)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        key = f"{step}/{name}"
        self.pictures[key] = pixels

        def log() -> None:
            if step > self.pictures_until:
                with self.tracker.refusals():
                    self.tracker.client.log_image(self.run_id, pixels, key=name, step=step, synchronous=True)
                self.pictures_until = step
            self.pictures.pop(key, None)

        self.tracker.queue.put(log)

    def unsent(self) -> tuple[list[list[Any]], dict[str, Tensor]]:
        points = [[point.key, point.value, point.timestamp, point.step] for point in list(self.points)]
        return points, {key: torch.from_numpy(pixels) for key, pixels in dict(self.pictures).items()}

    def resend(self, points: list[list[Any]], pictures: Mapping[str, Tensor]) -> None:
        self.points += [Metric(str(name), float(value), int(when), int(step)) for name, value, when, step in points]
        self.tracker.queue.put(self._send)
        for key, pixels in pictures.items():
            step, _, name = key.partition("/")
            self.picture(name, pixels.numpy(), int(step))

    def end(self, status: str) -> None:
        def log() -> None:
            if self.monitor is not None:
                self.monitor.finish()
                self.monitor = None
            when = None if self.goes_on else self.finished  # of what is reused only late records were sent
            with self.tracker.refusals():
                self.tracker.client.set_terminated(self.run_id, status, when)

        self.tracker.queue.put(log)

    def _open(self) -> None:
        client, job = self.tracker.client, self.tracker.job
        with self.tracker.refusals():
            runs = search_runs(client, job.experiment_id, FOLDER_TAG, self.folder)
            if runs:
                self.run_id = runs[0]
                known = client.get_run(self.run_id)
                if known.info.status == "FINISHED":
                    self.finished = known.info.end_time
                client.set_tag(self.run_id, OWNER_TAG, job.owner)
                client.update_run(self.run_id, status="RUNNING")
                self.until = {point.key: point.step for point in known.data._metric_objs}  # the newest of each
                self.pictures_until = newest_picture(client, self.run_id)
            else:
                tags = {
                    OWNER_TAG: job.owner,
                    MLFLOW_PARENT_RUN_ID: job.run_id,
                    MLFLOW_RUN_NAME: self.name,
                    FOLDER_TAG: self.folder,
                }
                tags["dircluster.stage"] = self.name
                self.run_id = client.create_run(job.experiment_id, run_name=self.name, tags=tags).info.run_id
            log_params(client, self.run_id, self.facts)
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
                    with self.tracker.refusals():
                        self.tracker.client.log_batch(self.run_id, metrics=new, synchronous=True)
            except Refused:
                del self.points[: len(batch)]
                raise
            del self.points[: len(batch)]
