"""Real jobs in processes of their own: the command line, torchrun, Ray, MLflow servers."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.local_cluster import free_ports
from tests.jobs import Outcome, environment, run_job, start_job


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Outcome]:
    """Run jobs/train.py, or another script, in ``tmp_path`` to its end: words -> Outcome.

    In this process where it is local or ``here``, else in a process of its own; ``workers`` of torchrun.
    """

    def run(*words: str, script: str = "train", workers: int = 0, here: bool | None = None) -> Outcome:
        local = ("--launcher", "local") in itertools.pairwise(words)
        if not workers and (local if here is None else here):
            return run_job(script, *words, folder=tmp_path)
        return start_job(script, *words, folder=tmp_path, workers=workers)

    return run


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start jobs/train.py, or another script, in ``tmp_path``, and return; what still runs at the end is ended."""
    begun: list[subprocess.Popen[str]] = []

    def run(*words: str, script: str = "train") -> subprocess.Popen[str]:
        command = [sys.executable, str(root / "jobs" / f"{script}.py"), *words]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=environment(),
            start_new_session=True,
        )
        begun.append(process)
        return process

    yield run
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class MlflowServer:
    """A real MLflow server over SQLite on loopback, which can be stopped and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)  # which no connection takes while the server is away
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | settings, start_new_session=True
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise TimeoutError(f"MLflow did not start: {(self.folder / 'server.log').read_text()[-500:]}")

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    """A running server."""
    folder = tmp_path / "mlflow"
    folder.mkdir()
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
