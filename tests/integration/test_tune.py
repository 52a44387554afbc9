"""Sweeps through jobs/tune.py: trained once, shown, recorded, not done again; bad input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dircluster.cluster import tune

Train = Callable[..., Any]
Start = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize("alphas", [[2.0], pytest.param([0.0, 2.0], marks=pytest.mark.slow)])
def test_a_sweep_then_again(alphas: list[float], train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"GRID = {{'dir.alpha': {alphas}}}\n")
    count, several = len(alphas), len(alphas) > 1
    words = ("digits_smoke", "--space", "mine.py", "--dir.epochs", "1")
    done = train(*words, script="tune")
    assert done.code == 0, done.out + done.err
    assert ("training what trials share, until pretrain: 1 runs" in done.out) == several
    assert done.out.count("1 of 2 trials, ETA") == several
    assert f"{count} of {count} trials" in done.out
    assert done.err == ""  # one quiet table, nothing of Ray's
    runs = tmp_path / "runs"
    assert len(list(runs.glob("target-*/final"))) == len(list(runs.glob("pretrain-*/final"))) == 1
    assert len(list(runs.glob("dir-*/final"))) == count
    assert not (runs / "ray").exists()
    kept = Path(done.summary["folder"])
    assert {file.name for file in kept.iterdir()} == {"best.txt", "best.yaml", "figure.png", "table.json"}
    assert (kept / "best.txt").read_text().startswith("python jobs/train.py digits_smoke ")
    assert [trial["settings"] for trial in done.summary["trials"]] == [{"dir.alpha": alpha} for alpha in alphas]

    again = train(*words, script="tune")
    assert again.code == 0, again.err
    assert "training what trials share" not in again.out
    assert again.out.count(f"{count} of {count} trials") == 1
    assert again.summary["trials"] == done.summary["trials"]

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'dircluster'")
    found = client.search_runs([experiment.experiment_id])
    top = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = (run for run in top if run.info.run_name == "digits_smoke-mine")
    shared = [run for run in top if run is not parent]
    assert [run.info.run_name for run in shared] == ["digits_smoke shared until pretrain, seed 0"] * several
    assert {run.data.tags["dircluster.sweep"] for run in shared} <= {parent.info.run_id}
    for run in shared:
        curves = [each for each in found if each.data.tags.get("mlflow.parentRunId") == run.info.run_id]
        assert sorted(each.info.run_name for each in curves) == ["pretrain", "target"]
        assert not run.data.params
    trials = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.params["dir.alpha"] for run in trials) == [str(alpha) for alpha in alphas]
    for run in trials:
        assert set(run.data.params) == {"dir.alpha"}
        assert len(client.get_metric_history(run.info.run_id, "robust")) == 1
        assert run.info.status == "FINISHED"
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"best.txt", "best.yaml", "figure.png", "results_table.json"} <= artifacts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_of_several_seeds_is_stopped_and_goes_on(train: Train, start: Start, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("SEARCH = {'masking.ratio': (0.636, 0.696)}\n")  # 0.66 leaves patches unseen
    words = ("digits_smoke", "--space", "mine.py", "--search", "--points", "3", "--seeds", "2", "--dir.epochs", "1")
    process = start(*words, "--max-concurrent", "1", script="tune")
    for line in process.stdout:
        if "2 of 6 trials" in line:
            break
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 130, out
    assert out.endswith("stopped; what is finished is kept, and the same command goes on\n")
    first = results(tmp_path)
    assert len(first) >= 2

    done = train(*words, "--max-concurrent", "1", script="tune")
    assert done.code == 1, done.out + done.err  # for the point that cannot be
    assert done.err == ""
    assert first.items() <= results(tmp_path).items()
    assert sorted(trial["status"] for trial in done.summary["trials"]) == ["FAILED"] * 2 + ["FINISHED"] * 4
    assert re.search(r"failed: ratio 0\.6\d*, seed 1: masking.count 3 at ratio 0\.6\d* leaves patches unseen", done.out)
    assert "6 of 6 trials" in done.out

    again = train(*words, script="tune")
    assert again.code == 1
    assert again.out.count("of 6 trials") == 1
    assert "training what trials share" not in again.out


@pytest.mark.slow
def test_asha_stops_what_is_behind(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("SEARCH = {'dir.optimizer.lr': [1e-3, 2e-3, 10.0]}\n")
    words = ("digits", "--space", "mine.py", "--search", "--points", "2", "--asha", "--max-concurrent", "1")
    words += ("--target.epochs", "20", "--pretrain.epochs", "4", "--dir.epochs", "8", "--training.select-every", "1")
    words += ("--attack.epsilon", "0.02", "--evaluation.images", "64")
    done = train(*words, script="tune")
    assert done.code == 0, done.out + done.err
    found = {trial["settings"]["dir.optimizer.lr"]: trial for trial in done.summary["trials"]}
    assert {lr: trial["status"] for lr, trial in found.items()} == {2e-3: "FINISHED", 10.0: "STOPPED"}
    assert found[10.0]["held_out"] < found[2e-3]["held_out"]
    again = train(*words, script="tune")
    assert again.code == 0
    assert again.summary["trials"] == done.summary["trials"]


def results(folder: Path) -> dict[str, str]:
    """What finished trainings found, by file."""
    return {place.name: place.read_text() for place in (folder / "runs" / "trials").glob("*.json")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "error: --space is missing"),
        (("--space", "none.py"), "error: --space none.py does not exist"),
        (("--space", "mine.py"), "error: --space mine: masking.ratio must lie in (0, 1), got 50; did you mean 0.5?"),
        (("--space", "mine.py", "--seeds", "0"), "error: --seeds must be at least 1, got 0"),
        (("--space", "other.py"), "error: --space other varies dir.beta, which is no setting that decides results;"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("GRID = {'masking.ratio': [50]}\n")
    Path("other.py").write_text("GRID = {'dir.beta': [1]}\n")
    assert tune.main(["digits_smoke", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(message)
    assert {file.name for file in tmp_path.iterdir()} == {"mine.py", "other.py"}
