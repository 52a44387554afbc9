"""A finished defense for others: served by MLflow where this package is not installed, and exported for hubs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dircluster import load_defense
from infra.local_cluster import free_ports
from tests.conftest import Trained
from tests.jobs import environment, run_job


def asked(url: str, images: np.ndarray[Any, Any]) -> Any:
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps({"inputs": images.tolist()}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]


@pytest.mark.slow
def test_a_registered_defense_is_served_by_its_own_code(trained: Trained, tmp_path: Path) -> None:
    broken = tmp_path / "path" / "dircluster"  # what Python finds instead of this package
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('the code of the model is not used')\n")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/dir-digits_smoke@candidate"]
    command += ["--env-manager", "local", "-h", "127.0.0.1", "-p", str(port)]
    settings = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{trained.folder}/runs/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONPATH": str(broken.parent),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow looks for uvicorn there
    }
    log, url = tmp_path / "log", f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=tmp_path, env=environment() | settings, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        images = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32)
        first, second = np.array(asked(url, images)), np.array(asked(url, images))
        assert first.shape == (3, 10)
        assert np.isfinite(first).all()
        assert not np.array_equal(first, second)  # fresh draws
        with pytest.raises(urllib.error.HTTPError) as refusal:
            asked(url, images.reshape(3, 8, 8, 1))
        assert refusal.value.code == 400
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_a_finished_defense_is_exported_as_hubs_show_it(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    words = ("digits_smoke", "--launcher", "local", "--tracking.no-enabled", "--export", "hub")
    done = run_job("train", *words, folder=tmp_path)
    assert done.code == 0, done.err
    assert "exported  hub" in done.out
    images, card = torch.rand(2, 1, 8, 8), (tmp_path / "hub" / "README.md").read_text()
    assert torch.equal(load_defense(tmp_path / "hub").fixed(1)(images), load_defense(trained.final).fixed(1)(images))
    assert 'dircluster.load_defense("hub")' in card
    refused = run_job("train", *words[:-1], "absent/hub", folder=tmp_path)
    assert (refused.code, refused.error) == (
        2,
        ["error: --export absent/hub: the folder that it would lie in does not exist"],
    )
