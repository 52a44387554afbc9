"""jobs/evaluate.py and jobs/benchmark.py: the same numbers from any number of workers, killed, resumed, misused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dircluster.cluster.commands import evaluate
from dircluster.training.profiling import PHASES
from tests.integration.conftest import environment

ROOT = Path(__file__).parents[2]
FEW = ("--evaluation.queries", "10", "--evaluation.verdict-images", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained defense in ``runs``, and a module of somebody's."""
    folder = tmp_path_factory.mktemp("evaluate")
    command = [
        sys.executable,
        str(ROOT / "jobs/train.py"),
        "digits_smoke",
        "--launcher",
        "local",
        "--summary",
        "t.json",
    ]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "mine.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n\n\n"
        "def sure():\n    return torch.nn.Sequential(make(), torch.nn.Softmax(dim=1))\n"
        "\n\ndef broken():\n    raise OSError('no')\n"
    )
    return folder


def command(*words: str, job: str = "evaluate") -> list[str]:
    return [sys.executable, str(ROOT / f"jobs/{job}.py"), "digits_smoke", *words]


def judge(place: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        command(*words, "--summary", "e.json"),
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((place / "e.json").read_text())
    return found | {"said": done.stdout}


def test_any_number_of_workers_killed_and_resumed_finds_the_same(place: Path) -> None:
    trained = json.loads((place / "t.json").read_text())
    words = ("--defense", trained["checkpoint"], "--suite", "quick", "--verdict", *FEW)
    here = judge(place, *words, "--launcher", "local", "--storage.uri", "here")
    assert here["results"] == trained["results"]  # training judged it the same

    process = subprocess.Popen(
        command(*words, "--storage.uri", "there", "--scaling.workers", "2"),
        cwd=place,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list((place / "there").glob("evaluations/*/*/shard-*.json"))) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {f: f.stat().st_mtime_ns for f in (place / "there").glob("evaluations/*/*/shard-*.json")}
    assert 5 <= len(kept) < 50
    there = judge(place, *words, "--storage.uri", "there", "--scaling.workers", "2")
    assert {f: f.stat().st_mtime_ns for f in kept} == kept  # not redone
    assert "shards are finished already" in there["said"]
    assert (there["rows"], there["verdict"]) == (here["rows"], here["verdict"])

    client = MlflowClient(f"sqlite:///{place}/there/mlflow.db")
    run = client.get_run(there["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/dir/natural/fresh"] == there["rows"][3]["accuracy"]
    kept_files = [Path(f.path) for f in client.list_artifacts(there["run_id"])]
    assert sorted(f.suffix for f in kept_files) == [".html", ".json"]
    assert all(f.name.startswith("report-quick-") for f in kept_files)


def test_what_training_has_evaluated_is_found(place: Path) -> None:
    trained = json.loads((place / "t.json").read_text())
    words = ("--defense", trained["checkpoint"], "--tracking.no-enabled", "--storage.uri", "runs")
    stored = sorted((place / "runs").glob("**/shard-*.json"))
    found = judge(place, *words, "--suite", "quick")  # Ray is the launcher, and is not started
    assert f"evaluation: reused from {stored[0].parents[1]}" in found["said"]
    assert "worker(s)" not in found["said"]
    assert found["results"] == trained["results"]
    assert sorted((place / "runs").glob("**/shard-*.json")) == stored
    more = judge(place, *words, "--launcher", "local", "--suite", "paper", "--no-verdict", *FEW)
    assert "shards are finished already" in more["said"]


def test_somebodys_module_and_the_bare_target(place: Path) -> None:
    words = ("--launcher", "local", "--tracking.no-enabled", "--storage.uri", "more")
    mine = judge(place, "--defense", "mine:make", *words)
    assert [(row["defense"], row["attack"]) for row in mine["rows"]] == [
        ("mine:make", "natural"),
        ("mine:make", "pgd2"),
    ]
    registered = ("--target.uri", "models:/dir-digits_smoke@champion", "--storage.uri", "runs")
    bare = judge(place, "--defense", "none", *words, *registered)
    trained = json.loads((place / "t.json").read_text())
    assert [row["accuracy"] for row in bare["rows"]] == [row["accuracy"] for row in trained["results"][:2]]


def test_bad_input_is_one_line_and_exit_2(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    final = json.loads((place / "t.json").read_text())["checkpoint"]
    cases = {
        "--defense is missing": (),
        "holds no committed": ("--defense", "nowhere"),
        "say which with --target.uri": ("--defense", "none"),
        "No module named 'absent'": ("--defense", "absent:make"),
        "has no attribute 'absent'": ("--defense", "mine:absent"),
        "OSError: no": ("--defense", "mine:broken"),
        "returns probabilities": ("--defense", "mine:sure"),
        "name the preset it was trained with": ("svhn_smoke", "--defense", final),
        "--suite": ("--defense", final, "--suite", "hard"),
        "evaluation.images must be positive": ("--defense", final, "--evaluation.images", "0"),
        "must not hold a user or password": ("--defense", "s3://me:CANARY@bucket/x"),
    }
    for message, words in cases.items():
        capfd.readouterr()
        given = words if words[:1] == ("svhn_smoke",) else ("digits_smoke", *words)
        data = ("--data.name", "digits") if words[:1] == ("svhn_smoke",) else ()
        assert evaluate.main([*given, "--launcher", "local", *data]) == 2, words
        (line,) = capfd.readouterr().err.splitlines()
        assert message in line, words
        assert "CANARY" not in line


def test_benchmark(place: Path) -> None:
    words = ("--steps", "2", "--summary", "b.json")
    timed = subprocess.run(
        command(*words, job="benchmark"), cwd=place, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert timed.returncode == 0, timed.stderr
    assert set(json.loads((place / "b.json").read_text())["seconds"]) == set(PHASES)
