"""The script behind the GPU tables of docs/results.md goes through every step on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_rehearses(root: Path, real_data: Path, tmp_path: Path) -> None:
    words = ["--data", str(real_data / "cifar10"), "--out", str(tmp_path), "--seconds", "60", "--rehearse"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(root / "infra/gpu/cifar10.py"), *words], check=True, env=environment)
    assert json.loads((tmp_path / "train.json").read_text())["judged"]
