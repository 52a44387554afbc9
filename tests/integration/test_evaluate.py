"""jobs/evaluate.py and jobs/benchmark.py: the same numbers from any number of workers, killed, resumed, misused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from dircluster.training.step import PHASES
from tests.conftest import Trained
from tests.jobs import ROOT, environment, run_job

FEW = ("--evaluation.queries", "10", "--evaluation.verdict-images", "8")


@pytest.fixture(scope="module")
def place(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trained defense in ``runs``, and a module of somebody's."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "runs").symlink_to(trained.folder / "runs")
    (folder / "mine.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n\n\n"
        "def sure():\n    return torch.nn.Sequential(make(), torch.nn.Softmax(dim=1))\n"
        "\n\ndef broken():\n    raise OSError('no')\n"
    )
    return folder


def judge(place: Path, *words: str) -> dict[str, Any]:
    done = run_job("evaluate", "digits_smoke", *words, folder=place)
    assert done.code == 0, done.err
    return done.summary | {"said": done.out}


def test_a_natural_target_that_does_not_fit_is_refused_before_anything_is_judged(place: Path, trained: Trained) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), place / "other.pt")
    words = ("--defense", trained.final, "--natural-target", "other.pt", "--storage.uri", "refused", *FEW)
    done = run_job("evaluate", "digits_smoke", *words, "--launcher", "local", folder=place)
    assert done.code == 2
    assert "other.pt' does not fit the model" in done.err.splitlines()[-1]
    assert not list((place / "refused").glob("evaluations/*/*/shard-*.json"))


@pytest.mark.slow
def test_shards_of_nodes_that_are_lost_for_good_are_done(root: Path, tmp_path: Path) -> None:
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(root / "tests/integration/lost_nodes.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment() | own)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["one of two"] == {"done": [0, 1], "said": []}  # by the node that is left
    assert found["the last"]["done"] == [2]
    assert found["the last"]["said"][0] == "waiting for a place in the cluster: 0 CPUs are free"


def test_any_number_of_workers_killed_and_resumed_finds_the_same(place: Path, trained: Trained) -> None:
    words = ("--defense", trained.final, "--suite", "quick", "--verdict", *FEW)
    here = judge(place, *words, "--launcher", "local", "--storage.uri", "here")
    assert here["results"] == trained.summary["results"]  # training judged it the same

    there = ("--storage.uri", "there", "--scaling.workers", "2")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/evaluate.py"), "digits_smoke", *words, *there],
        cwd=place,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    while len(list((place / "there").glob("evaluations/*/*/shard-*.json"))) < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {f: f.stat().st_mtime_ns for f in (place / "there").glob("evaluations/*/*/shard-*.json")}
    assert 5 <= len(kept) < len(list((place / "here").glob("evaluations/*/*/shard-*.json")))
    found = judge(place, *words, *there[:2], "--launcher", "local")  # one worker goes on with what two have begun
    assert {f: f.stat().st_mtime_ns for f in kept} == kept  # not redone
    assert "shards are finished already" in found["said"]
    assert (found["rows"], found["verdict"]) == (here["rows"], here["verdict"])

    client = MlflowClient(f"sqlite:///{place}/there/mlflow.db")
    run = client.get_run(found["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/dir/natural/fresh"] == next(
        row["accuracy"] for row in found["rows"] if (row["attack"], row["protocol"]) == ("natural", "fresh draws")
    )
    kept_files = [Path(f.path) for f in client.list_artifacts(found["run_id"])]
    assert sorted(f.suffix for f in kept_files) == [".html", ".json"]
    assert all(f.name.startswith("report-quick-") for f in kept_files)


def test_what_training_has_evaluated_is_found(place: Path, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    words = ("--defense", trained.final, "--tracking.no-enabled", "--storage.uri", str(tmp_path / "runs"))
    stored = sorted((tmp_path / "runs").glob("**/shard-*.json"))
    found = judge(place, *words, "--suite", "quick")  # Ray is the launcher, and is not started
    assert f"evaluation: reused from {stored[0].parents[1]}" in found["said"]
    assert "worker(s)" not in found["said"]
    assert found["results"] == trained.summary["results"]
    assert sorted((tmp_path / "runs").glob("**/shard-*.json")) == stored
    more = judge(place, *words, "--launcher", "local", "--suite", "paper", "--no-verdict", *FEW)
    assert "shards are finished already" in more["said"]


def test_somebodys_module_and_the_bare_target(place: Path, trained: Trained) -> None:
    words = ("--launcher", "local", "--tracking.no-enabled", "--storage.uri", "more")
    mine = judge(place, "--defense", "mine:make", *words)
    assert [(row["defense"], row["attack"]) for row in mine["rows"]] == [
        ("mine:make", "natural"),
        ("mine:make", "pgd2"),
        ("mine:make", "pgd2-margin"),
        ("mine:make", "malt"),
    ]
    registered = ("--target.uri", "models:/dir-digits_smoke@champion", "--storage.uri", "runs")
    bare = judge(place, "--defense", "none", *words, *registered)
    same = {row["attack"]: row["accuracy"] for row in trained.summary["results"] if row["defense"] == "none"}
    assert set(same) == {"natural", "pgd2", "malt"}
    assert {row["attack"]: row["accuracy"] for row in bare["rows"] if row["attack"] in same} == same


def test_what_comes_with_the_package(place: Path) -> None:
    words = ("--launcher", "local", "--tracking.no-enabled", "--storage.uri", "shipped", "--evaluation.images", "8")
    rows = judge(place, "--defense", "zoo:digits-dir", "--surrogate", "zoo:digits-at", *words)["rows"]
    assert {row["defense"] for row in rows} == {"none", "dir"}
    bare = judge(place, "--defense", "zoo:digits-at", *words)["rows"]
    found = {row["attack"]: row["accuracy"] for row in rows if row["defense"] == "none"}
    assert set(found) == {"natural", "pgd2", "malt"}
    assert {row["attack"]: row["accuracy"] for row in bare if row["attack"] in found} == found


def test_bad_input_is_one_line_and_exit_2(place: Path, trained: Trained) -> None:
    final = trained.final
    cases = {
        "--defense is missing": (),
        "does not exist": ("--defense", "nowhere"),
        "say which with --target.uri": ("--defense", "none"),
        "there is no module 'absent'": ("--defense", "absent:make"),
        "has no attribute 'absent'": ("--defense", "mine:absent"),
        "OSError: no": ("--defense", "mine:broken"),
        "returns probabilities": ("--defense", "mine:sure"),
        "name the preset it was trained with": ("--defense", "zoo:cifar10-small-dir"),
        "--suite": ("--defense", final, "--suite", "hard"),
        "evaluation.images must be positive": ("--defense", final, "--evaluation.images", "0"),
        "must not hold a user or password": ("--defense", "s3://me:CANARY@bucket/x"),
        "--surrogate must not hold a user": ("--defense", "zoo:digits-dir", "--surrogate", "s3://me:CANARY@bucket/x"),
    }
    for message, words in cases.items():
        done = run_job("evaluate", "digits_smoke", *words, "--launcher", "local", folder=place)
        assert done.code == 2, words
        (line,) = done.error
        assert message in line, words
        assert "CANARY" not in line


def test_benchmark(place: Path) -> None:
    timed = run_job("benchmark", "digits_smoke", "--steps", "2", folder=place)
    assert timed.code == 0, timed.err
    assert set(timed.summary["seconds"]) == set(PHASES)


def test_a_comparison_of_steps(place: Path) -> None:
    timed = run_job("benchmark", "digits_smoke", "--compare", "--steps", "2", folder=place)
    assert timed.code == 0, timed.err
    assert [row["step"] for row in timed.summary["steps"]] == ["plain", "paper", "fast"]
    assert "times the first" in timed.out
    assert "% of the matrix-product rate" in timed.out
    assert all(row["share_of_matrix_product_rate"] > 0 for row in timed.summary["steps"])


def test_a_benchmark_that_cannot_be_is_refused_before_it_reads(place: Path) -> None:
    compare = ["--compare", "--storage.uri", "untouched"]
    cases = {
        "--steps must be at least 1, got 0": ["digits_smoke", "--steps", "0"],
        "--compare has nothing to compare the step of hgd with": ["svhn_hgd_smoke", *compare],  # without a download
        "--compare is of Algorithm 1: attack.norm linf, dir.crafting_masks shared, dir.mse_weight 0, no dir.joint": [
            *("cifar10_joint_smoke", *compare)
        ],
        "a benchmark is one worker: start scaling.workers 2 by torchrun": ["digits_smoke", "--scaling.workers", "2"],
    }
    for message, words in cases.items():
        done = run_job("benchmark", *words, folder=place)
        assert (done.code, done.error) == (2, [f"error: {message}"])
    assert not (place / "untouched").exists()
