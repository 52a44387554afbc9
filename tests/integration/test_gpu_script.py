"""The scripts behind the GPU tables of docs/results.md go through every step on a CPU."""

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


@pytest.mark.slow
def test_a_stored_defense_is_judged_and_what_was_cut_off_goes_on(root: Path, real_data: Path, tmp_path: Path) -> None:
    words = ["--data", str(real_data / "cifar10"), "--defense", str(root / "dircluster/zoo/cifar10-dir"), "--rehearse"]
    command = [sys.executable, str(root / "infra/gpu/judge.py"), *words, "--out", str(tmp_path), "--seconds"]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    assert subprocess.run([*command, "0"], env=environment).returncode == 1
    assert json.loads((tmp_path / "judged.json").read_text())["rows"] == []
    done = subprocess.run([*command, "600"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "judged.json").read_text())["rows"]
    assert [row["attack"] for row in rows][-4:] == ["autoattack-standard"] * 2 + ["malt"] * 2
    assert len(rows) == 10
