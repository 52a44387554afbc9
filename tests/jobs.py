"""Jobs as a person starts them, but in this process where nothing is to be killed: imports cost seconds each time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dircluster.cluster  # noqa: F401 - it sets what Ray and MLflow read from the environment when they are imported

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")
FOREIGN = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RANK", "WORLD_SIZE", "FORCE_COLOR")
"""What would lead a job to a cluster, server or group that is not the test's own, or into colors."""


@dataclass
class Outcome:
    """How a job ended."""

    code: int
    out: str
    err: str
    summary: dict[str, Any]

    @property
    def error(self) -> list[str]:
        """Lines on stderr."""
        return self.err.strip().splitlines()


def environment() -> dict[str, str]:
    """This process's, less what is foreign, with workers that are watched closely and have one thread each."""
    return {
        **{name: value for name, value in os.environ.items() if name not in FOREIGN},
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
        "OMP_NUM_THREADS": "1",
    }


def run_job(script: str, *words: str, folder: Path, env: Mapping[str, str] | None = None) -> Outcome:
    """jobs/SCRIPT.py with ``words``, in this process and in ``folder``."""
    file, out, err = ROOT / "jobs" / f"{script}.py", _stream(), _stream()
    summary, words = folder / "summary.json", _with_summary(words)
    summary.unlink(missing_ok=True)
    code: Any = 0
    with (
        _as_if_alone(environment() | dict(env or {})),
        contextlib.chdir(folder),
        mock.patch.object(sys, "argv", [str(file), *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
    found = json.loads(summary.read_text()) if summary.exists() else {}
    return Outcome(int(code), _text(out), _text(err), found)


def start_job(
    script: str, *words: str, folder: Path, env: Mapping[str, str] | None = None, workers: int = 0
) -> Outcome:
    """The same in a process of its own, or in ``workers`` processes of torchrun."""
    summary = folder / "summary.json"
    summary.unlink(missing_ok=True)
    command = [sys.executable]
    if workers:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += [str(ROOT / "jobs" / f"{script}.py"), *_with_summary(words)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment() | dict(env or {}), timeout=420
    )
    found = json.loads(summary.read_text()) if summary.exists() else {}
    return Outcome(done.returncode, done.stdout, done.stderr, found)


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)  # as a pipe: help draws by encoding


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def _with_summary(words: tuple[str, ...]) -> tuple[str, ...]:
    return words if "--summary" in words else (*words, "--summary", "summary.json")


@contextlib.contextmanager
def _as_if_alone(env: Mapping[str, str]) -> Iterator[None]:
    """What a job changes for its process is put back after it."""
    threads, paths = torch.get_num_threads(), list(sys.path)
    try:
        with mock.patch.dict(os.environ, env, clear=True):
            yield
    finally:
        torch.set_num_threads(threads)
        sys.path[:] = paths
