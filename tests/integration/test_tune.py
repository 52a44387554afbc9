"""Sweeps through jobs/tune.py: trained once, shown, recorded, not done again; bad input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file

from dircluster.cluster.commands import tune
from dircluster.config import with_values
from dircluster.defenses.table import find_defense
from dircluster.presets import preset

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

    again = train(*words, script="tune", here=True)
    assert again.code == 0, again.err
    assert "training what trials share" not in again.out
    assert again.out.count(f"{count} of {count} trials") == 1
    assert again.summary["trials"] == done.summary["trials"]

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'dircluster'")
    found = client.search_runs([experiment.experiment_id])
    top = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = (run for run in top if run.info.run_name == "digits_smoke-mine-seed0")
    assert parent.data.tags["dircluster.command"].startswith("python jobs/tune.py digits_smoke ")
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
        assert run.data.tags["mlflow.source.name"] == "jobs/tune.py"  # not the script of Ray's workers
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
    out, _ = process.communicate(timeout=300)
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
    words += ("--attack.epsilon", "0.02", "--evaluation.images", "16")
    done = train(*words, script="tune")
    assert done.code == 0, done.out + done.err
    found = {trial["settings"]["dir.optimizer.lr"]: trial for trial in done.summary["trials"]}
    assert {lr: trial["status"] for lr, trial in found.items()} == {2e-3: "FINISHED", 10.0: "STOPPED"}
    assert found[10.0]["held_out"] < found[2e-3]["held_out"]
    again = train(*words, script="tune")
    assert again.code == 0
    assert again.summary["trials"] == done.summary["trials"]


@pytest.mark.slow
def test_given_targets_are_varied_and_noticed_when_they_were_replaced(train: Train, tmp_path: Path) -> None:
    def give(name: str, seed: int) -> None:
        seeded = with_values(preset("digits_smoke"), {"seed": seed})
        classifier = find_defense("dir").build(seeded, "classifier")
        save_file(classifier.state_dict(), tmp_path / name)

    give("one.safetensors", 1)
    give("two.safetensors", 2)
    (tmp_path / "mine.py").write_text("GRID = {'target.uri': ['one.safetensors', 'two.safetensors']}\n")
    words = ("digits_smoke", "--space", "mine.py", "--dir.epochs", "1")
    done = train(*words, script="tune")
    assert done.code == 0, done.out + done.err
    assert "training what trials share" not in done.out
    one, two = done.summary["trials"]
    assert [Path(found["settings"]["target.uri"]).name for found in (one, two)] == [
        "one.safetensors",
        "two.safetensors",
    ]
    assert one["checkpoint"] != two["checkpoint"]

    give("one.safetensors", 3)
    again = train(*words, script="tune")
    assert again.code == 0, again.err
    replaced, same = again.summary["trials"]
    assert replaced["checkpoint"] not in (one["checkpoint"], two["checkpoint"])
    assert same == two
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'dircluster'")
    found = client.search_runs([experiment.experiment_id])
    sweeps = {run.info.run_id for run in found if run.info.run_name == "digits_smoke-mine-seed0"}
    assert len(sweeps) == 2
    trials = [run for run in found if run.data.tags.get("mlflow.parentRunId") in sweeps]
    shown = sorted(run.data.metrics["robust"] for run in trials)
    assert shown == sorted(trial["robust"] for trial in (one, two, replaced, same))


@pytest.mark.slow
def test_trials_do_not_begin_when_what_they_share_has_failed(train: Train, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("GRID = {'dir.alpha': [0.0, 1.0, 2.0]}\n")
    words = ("digits_smoke", "--space", "mine.py", "--seeds", "2", "--retries", "0")
    done = train(*words, "--target.optimizer.lr", "1e30", script="tune")
    assert done.code == 1, done.out + done.err
    assert len(re.findall("failed, though shared: alpha 0, seed [01]: .* is not finite", done.out)) == 2
    assert done.out.count("failed:") == 0
    assert "6 of 6 trials" in done.out
    assert [trial["status"] for trial in done.summary["trials"]] == ["FAILED"] * 6
    assert all("is not finite" in trial["error"] for trial in done.summary["trials"])
    assert not list((tmp_path / "runs").glob("dir-*"))
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'dircluster'")
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FAILED"}
    assert len([run for run in found if "dir.alpha" in run.data.params]) == 6


@pytest.mark.slow
def test_a_trial_waits_for_a_server_that_is_away(start: Start, mlflow_server: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("GRID = {'dir.alpha': [0.0, 2.0]}\n")
    words = ("digits_smoke", "--space", "mine.py", "--dir.epochs", "2", "--max-concurrent", "1")
    process = start(*words, "--tracking.uri", mlflow_server.uri, script="tune")
    while len(results(tmp_path)) < 2:  # what both share, and the first trial
        assert process.poll() is None
        time.sleep(0.1)
    mlflow_server.stop()  # before the second trial has opened its run
    time.sleep(30)
    assert process.poll() is None
    assert len(results(tmp_path)) == 2
    mlflow_server.start()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "2 of 2 trials" in out
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("dircluster")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    (parent,) = (run for run in found if run.info.run_name == "digits_smoke-mine-seed0")
    trials = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.params["dir.alpha"] for run in trials) == ["0.0", "2.0"]
    for run in trials:
        assert len(client.get_metric_history(run.info.run_id, "robust")) == 1
        (curve,) = (each for each in found if each.data.tags.get("mlflow.parentRunId") == run.info.run_id)
        steps = [metric.step for metric in client.get_metric_history(curve.info.run_id, "loss/total")]
        assert steps == list(range(1, len(steps) + 1))
        assert steps


@pytest.mark.slow
def test_files_without_a_byte_are_as_good_as_none(train: Train, tmp_path: Path) -> None:
    """A machine that loses power leaves some: the same command makes them again, from stages that are whole."""
    (tmp_path / "mine.py").write_text("GRID = {'dir.alpha': [2.0]}\n")
    words = ("digits_smoke", "--space", "mine.py", "--dir.epochs", "1")
    done, runs = train(*words, script="tune"), tmp_path / "runs"
    assert done.code == 0, done.err
    emptied = [
        file
        for name in ("ray", "sweeps", "trials", "evaluations")
        for file in (runs / name).rglob("*")
        if file.is_file()
    ]
    assert {file.relative_to(runs).parts[0] for file in emptied} >= {"sweeps", "trials", "evaluations"}
    for file in emptied:
        file.write_bytes(b"")
    left = runs / "ray" / "gone" / "trial"  # what a killed job leaves of Ray's
    left.mkdir(parents=True)
    (left / "experiment_state.json").write_bytes(b"")
    again = train(*words, script="tune")
    assert again.code == 0, again.out + again.err
    found = [{**trial, "seconds": 0} for call in (done, again) for trial in call.summary["trials"]]
    assert found[0] == found[1]
    assert again.err == ""
    kept = Path(again.summary["folder"])
    assert all(file.stat().st_size for file in kept.iterdir())


def results(folder: Path) -> dict[str, str]:
    """What finished trainings found, by file."""
    return {place.name: place.read_text() for place in (folder / "runs" / "trials").glob("*.json")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "error: --space is missing"),
        (("--space", "none.py"), "error: --space none.py does not exist"),
        (("--space", "mine.py"), "error: --space mine: masking.ratio must lie in (0, 1), got 50; did you mean 0.5?"),
        (
            ("--space", "mine.py", "--points", "5"),
            "error: --points says how many points a search chooses: add --search",
        ),
        (("--space", "mine.py", "--seeds", "0"), "error: --seeds must be at least 1, got 0"),
        (("--space", "other.py"), "error: --space other varies dir.beta, which is no setting that decides results;"),
        (("--space", "large.py"), "error: training.batch_size 1000 is more than the 72 training images"),
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
    Path("large.py").write_text("GRID = {'training.batch_size': [16, 1000]}\n")
    assert tune.main(["digits_smoke", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(message)
    assert {file.name for file in tmp_path.iterdir()} == {"mine.py", "other.py", "large.py"}


def test_a_job_with_a_space_of_its_own_takes_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    alpha = Path(__file__).parents[2] / "tune_spaces" / "alpha.py"
    assert tune.main(["digits_smoke", "--space", "mine.py", "--print-config"], alpha) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "error: --space is alpha.py here, got mine.py: leave it out, or use jobs/tune.py"
    assert tune.main(["digits_smoke", "--print-config"], alpha) == 0


@pytest.mark.parametrize("flag", ["--search", "--asha"])
def test_what_has_no_held_out_accuracy_is_not_chosen_by_it(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("GRID = {'ebm.data_noise': [0.01]}\nSEARCH = {'ebm.data_noise': (0.01, 0.1)}\n")
    assert tune.main(["digits_ebm_smoke", "--space", "mine.py", flag]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {flag} chooses by robust accuracy on held-out images, and the last stage of ebm ")
