"""Real parts to break: an S3 server, a whole cluster, and jobs on it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from dircluster.cluster import storage
from dircluster.config import StorageConfig
from infra.local_cluster import BUCKET, Cluster
from tests.jobs import RAY, ROOT, run_job

SMOKE = ("digits_smoke", "--training.select-every", "5", "--tracking.picture-every", "5")
"""A run whose first two stages take seconds; the DIR stage, of four steps an epoch, is what is broken into."""


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An S3 server alone."""
    made = Cluster(tmp_path_factory.mktemp("s3"))
    try:
        made.start_s3()
        yield made
    finally:
        made.down()


@pytest.fixture
def bucket(s3: Cluster, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A prefix of the test's own in the bucket, with credentials in this process's environment."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    return storage.open_path(f"s3://{BUCKET}/{_plain(request.node.name)}", StorageConfig())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Job:
    """jobs/train.py, or another script, as a driver on a cluster, watched from outside."""

    def __init__(self, cluster: Cluster, name: str, folder: Path, *words: str, script: str = "train") -> None:
        self.cluster, self.name, self.script = cluster, name, script
        self.uri = f"s3://{BUCKET}/{name}"
        self.words = [*SMOKE, *words, "--storage.uri", self.uri, "--tracking.experiment", name, "--seed", "3"]
        self.folder = folder
        self.summary = folder / "summary.json"
        self.log = folder / "job.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.storage = storage.open_path(self.uri, StorageConfig())

    def start(self) -> Job:
        """Start it, or start it again under the same name."""
        command = [sys.executable, str(ROOT / "jobs" / f"{self.script}.py")]
        return self._begin(command, self.folder, {"RAY_ADDRESS": self.cluster.gcs})

    def submit(self) -> Job:
        """Submit it by jobs/submit.py: this checkout is packed and sent, and the driver runs on the cluster."""
        command = [sys.executable, "jobs/submit.py", "--", "python", f"jobs/{self.script}.py"]
        return self._begin(command, ROOT, {})

    def _begin(self, command: Sequence[str], folder: Path, settings: dict[str, str]) -> Job:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.words, "--summary", str(self.summary)],
                stdout=log,
                stderr=log,
                env=os.environ | self.cluster.environment() | settings,
                cwd=folder,
                start_new_session=True,
            )
        return self

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")  # a character may be half written

    def end(self, seconds: float) -> int:
        """Wait for its exit code; what takes longer than ``seconds`` fails the test."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the job did not end within {seconds} s:\n{self.said[-3000:]}")

    def kill(self) -> None:
        """SIGKILL the driver, or what submitted it."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def committed(self, stage: str = "dir") -> int:
        """The newest committed step of a stage, 0 while there is none."""
        steps = [int(f.parent.name[5:]) for f in self.storage.glob(f"{stage}-*/step-*/COMMIT")]
        return max(steps, default=0)

    def wait_for(self, step: int, seconds: float = 180.0) -> int:
        """Until more than ``step`` steps of the DIR stage are committed; -> how many are."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.said[-3000:]
            if (now := self.committed()) > step:
                return now
            time.sleep(0.2)
        pytest.fail(f"nothing was committed after step {step} within {seconds} s:\n{self.said[-3000:]}")

    def wait_until(self, holds: Callable[[], bool], seconds: float = 180.0) -> None:
        """Until something holds, while the job lives."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process is not None
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.2)

    def workers(self) -> list[psutil.Process]:
        """The processes of its Ray Train workers."""
        return [p for p in self.cluster.processes() if "RayTrainWorker" in " ".join(command_of(p))]

    def wait_for_workers(self, number: int, seconds: float = 240.0, gone: Sequence[psutil.Process] = ()) -> None:
        """Until so many workers are at work, none of them one of ``gone``."""
        deadline = time.monotonic() + seconds
        while len(found := self.workers()) != number or any(worker in gone for worker in found):
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(1)

    def end_past_killed_workers(self, kills: int) -> None:
        """To the end of a run of two workers, one of which is killed so many times and loses nothing stored."""
        chance = random.Random(kills)
        done, known = 0, []
        for _ in range(kills):
            self.wait_for(done)
            time.sleep(chance.random())
            known.append(self.committed())
            at_work = self.workers()
            os.kill(chance.choice(at_work).pid, signal.SIGKILL)
            self.wait_for_workers(2, gone=at_work)
            done = self.committed()  # what the dead committed to their end is no sign of these
        assert self.end(400) == 0, self.said[-3000:]
        resumed = [int(step) for step in re.findall(r"dir: resuming at step (\d+)", self.said)]
        assert len(resumed) == kills
        assert all(at >= stored for at, stored in zip(resumed, known, strict=True)), (resumed, known)

    def weights(self) -> dict[str, str]:
        """SHA-256 of the finished defense's weights."""
        folder = storage.open_path(json.loads(self.summary.read_text())["checkpoint"], StorageConfig())
        return weights_in(folder)

    def must_have_one_whole_record(self, steps: int) -> None:
        """One parent, one child a stage, and every step of the DIR stage once."""
        client = MlflowClient(self.cluster.mlflow_url)
        experiment = client.get_experiment_by_name(self.name)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        stages = sorted(run.data.tags.get("dircluster.stage", "") for run in runs)
        assert stages == ["", "dir", "pretrain", "target"]
        assert {run.info.status for run in runs} == {"FINISHED"}
        (stage,) = (run for run in runs if run.data.tags.get("dircluster.stage") == "dir")
        points = [metric.step for metric in client.get_metric_history(stage.info.run_id, "loss/total")]
        assert points == list(range(1, steps + 1))
        pictures = [f.path for f in client.list_artifacts(stage.info.run_id, "images") if f.path.endswith(".webp")]
        found = sorted(int(picture.partition("+step+")[2].partition("+")[0]) for picture in pictures)
        assert found == list(range(20, steps + 1, 20))  # one in five epochs


def command_of(process: psutil.Process) -> list[str]:
    """The words that it was started by; none where it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def weights_in(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights in a checkpoint."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.safetensors")}


@pytest.fixture
def job(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Job]]:
    """Make jobs of the test's own; what still runs at its end is ended."""
    made: list[Job] = []
    for name, value in cluster.environment().items():
        if not name.startswith("RAY_API"):
            monkeypatch.setenv(name, value)

    def make(*words: str, script: str = "train") -> Job:
        made.append(Job(cluster, _plain(request.node.name), tmp_path, *words, script=script))
        return made[-1]

    yield make
    for one in made:
        if one.process is not None and one.process.poll() is None:
            one.kill()
            for submitted in re.findall(r"Job '(raysubmit_\w+)' submitted", one.said):
                subprocess.run(
                    [RAY, "job", "stop", submitted],
                    env=os.environ | cluster.environment(),
                    capture_output=True,
                    timeout=120,
                    check=False,
                )


@pytest.fixture
def unbroken(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Weights of the same run that nothing happened to, in this process: words -> SHA-256 by file."""

    def run(*words: str) -> dict[str, str]:
        folder = tmp_path / "unbroken"
        folder.mkdir()
        alone = ("--seed", "3", "--launcher", "local", "--tracking.no-enabled")
        done = run_job("train", *SMOKE, *words, *alone, folder=folder)
        assert done.code == 0, done.out[-2000:] + done.err
        return weights_in(Path(done.summary["checkpoint"]))

    return run
