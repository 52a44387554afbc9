"""jobs/reproduce.py: a table whole, then again, with a system that fails, killed and gone on with; bad input."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from dircluster.cluster.commands import replay
from dircluster.evaluation.claims import Claim, problem_of
from dircluster.evaluation.leaderboard import COLUMNS
from dircluster.evaluation.results import name_of
from tests.jobs import Outcome, run_job

FEW = ("--evaluation.images", "4", "--evaluation.queries", "10", "--scaling.threads", "1")
LOCAL = ("--launcher", "local", *FEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of this module leave what they train, for the next one."""
    return tmp_path_factory.mktemp("reproduced")


@pytest.fixture(scope="module")
def reproduced(folder: Path) -> Outcome:
    """Table 1 of two systems."""
    done = run_job("reproduce", "table1", "digits_smoke", "--only", "identity,dir", *LOCAL, folder=folder)
    assert done.code == 0, done.out + done.err
    return done


def cells(done: Outcome, exhibit: int = 0) -> dict[tuple[str, str], Any]:
    return {(cell["line"], cell["column"]): cell for cell in done.summary["exhibits"][exhibit]["cells"]}


def rows_of(done: Outcome) -> list[list[str]]:
    """The plan as it was shown before anything began."""
    shown = done.out[: done.out.index("reuses: stages")].splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in shown if line.startswith("│")]


def test_a_table(reproduced: Outcome, folder: Path) -> None:
    assert "2 trainings, 0 transfers" in reproduced.out
    planned = rows_of(reproduced)
    assert [row[:4] for row in planned] == [
        ["identity", "0", "target", ""],
        ["dir", "0", "pretrain, dir", "(target)"],  # DIR finds that of None
        ["in all", "", "", ""],
    ]
    assert all(float(row[5]) > 0 for row in planned)
    assert sum(float(row[6].split()[0]) for row in planned[:2]) == pytest.approx(100, abs=0.2)
    assert len(list((folder / "runs").glob("target-*/final"))) == 1
    found = cells(reproduced)
    for column in ("natural", "pgd20", "autoattack-standard", "mifgsm20", "vnifgsm20", "strongest"):
        for line in ("None", "DIR"):
            assert found[line, column]["found"]["images"] == 4, column
    assert found["DIR", "pgd20"]["printed"] == {"value": 54.27, "where": "Table 1, CIFAR-10, row DIR, column pgd20"}
    assert found["DIR", "pgd20"]["difference"] is None  # digits are not CIFAR-10
    (command,) = found["DIR", "pgd20"]["commands"]
    assert command.startswith("python jobs/train.py digits_smoke --evaluation.suite paper")
    here = reproduced.summary["facts"]["commit"]
    assert [each["system"] for each in reproduced.summary["code"]] == ["identity, seed 0", "dir, seed 0"]
    assert reproduced.summary["code"][1]["trained_by"] == {stage: [here] for stage in ("target", "pretrain", "dir")}
    assert {each["judged_by"] for each in reproduced.summary["code"]} == {here}
    kept = Path(reproduced.summary["folder"])
    page = {f"reproduction.{kind}" for kind in ("html", "md", "json")}
    assert {file.name for file in kept.iterdir()} - {"leaderboard.md", "leaderboard.html"} == {*page, "claims"}
    assert json.loads((kept / "reproduction.json").read_text())["exhibits"] == reproduced.summary["exhibits"]


def test_each_system_has_a_claim(reproduced: Outcome) -> None:
    kept = Path(reproduced.summary["folder"])
    claims = {file.name: json.loads(file.read_text()) for file in (kept / "claims").iterdir()}
    assert set(claims) == {"identity-seed-0.json", "dir-seed-0.json"}
    taken = [name.removesuffix(".json") for name, claim in claims.items() if not problem_of(claim)]
    if taken:  # of code that a commit holds
        lines = (kept / "leaderboard.md").read_text()
        assert all(f"| {name}" in lines for name in taken)
    else:
        assert "left off the leaderboard: 2 claims: it was found by code that no commit holds" in reproduced.out
    whole = Claim("dir", claims["dir-seed-0.json"])
    assert [column for column in COLUMNS if whole.row(column) is None] == []  # the suite fills the leaderboard
    found = cells(reproduced)
    rows = {name_of(row): row["accuracy"] for row in claims["dir-seed-0.json"]["rows"]}
    for column in ("natural", "pgd20", "autoattack-standard", "strongest"):
        (command,) = found["DIR", column]["replays"]
        assert rows[command.split()[-1]] == found["DIR", column]["found"]["mean"]


def test_a_cell_is_computed_again(reproduced: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = cells(reproduced)["DIR", "pgd20"]["replays"]
    python, job, *words = shlex.split(command)
    assert (python, job) == ("python", "jobs/replay.py")
    assert replay.main(words) == 0
    told = capsys.readouterr().out
    assert "images   the same to the bit" in told
    assert told.rstrip().endswith("holds")


def test_it_is_one_run_with_children(reproduced: Outcome, folder: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'dircluster'")
    found = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in found if run.info.run_name == "digits_smoke-reproduce-table1-seed0")
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {"identity, seed 0", "dir, seed 0"}
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    (command,) = {run.data.tags["dircluster.command"] for run in [parent, *children]}
    assert command.startswith("python jobs/reproduce.py table1 digits_smoke ")
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"reproduction.html", "results_table.json"} <= files


def test_what_is_reused_and_what_is_transferred_are_children_too(reproduced: Outcome, folder: Path) -> None:
    done = run_job("reproduce", "table2", "digits_smoke", "--only", "identity,dir", *LOCAL, folder=folder)
    assert done.code == 0, done.out + done.err
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'dircluster'")
    found = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in found if run.info.run_name == "digits_smoke-reproduce-table2-seed0")
    children = {r.info.run_name: r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    trained = {f"identity, objective {word}, seed 0" for word in ("trades", "mart")}
    assert set(children) == {"dir, seed 0", *trained, "dir onto trades, seed 0", "dir onto mart, seed 0"}
    onto = children["dir onto trades, seed 0"]
    assert onto.info.status == "FINISHED"
    assert onto.data.params["onto"] == "trades"
    found_again = cells(done)["TRADES: DIR", "pgd20"]["found"]["mean"]
    assert onto.data.metrics["test/dir/pgd2/fixed"] == found_again
    again = run_job("reproduce", "table2", "digits_smoke", "--only", "identity,dir", *LOCAL, folder=folder)
    assert again.code == 0, again.err
    history = client.get_metric_history(onto.info.run_id, "robust_accuracy")
    assert len(history) == 1


def test_again_nothing_is_trained(reproduced: Outcome, folder: Path) -> None:
    words = ("table1", "digits_smoke", "--only", "identity,dir", *LOCAL)
    again = run_job("reproduce", *words, folder=folder)
    assert again.code == 0, again.err
    assert again.out.count("reused: ") == 2
    assert [row[2:6] for row in rows_of(again)] == [
        ["", "target", "paper", ""],
        ["", "target, pretrain, dir", "paper", ""],
        ["", "", "", ""],
    ]
    assert again.summary["exhibits"] == reproduced.summary["exhibits"]


def test_a_system_that_fails_leaves_the_others(
    reproduced: Outcome, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("planted\nand more of it")

    words = ("table2", "digits_smoke", "--only", "identity,hgd", *LOCAL, "--tracking.no-enabled")
    with monkeypatch.context() as planted:
        planted.setattr("dircluster.defenses.hgd.HgdRecipe.compare", fail)
        done = run_job("reproduce", *words, folder=folder)
    assert done.code == 1
    planned = {row[0]: row[2:] for row in rows_of(done)}
    assert planned["hgd"] == ["hgd", "target", "quick", "?", "?"]  # it cannot be counted either
    told = ["hgd, seed 0", "hgd onto trades, seed 0", "hgd onto mart, seed 0"]
    assert done.error == [f"error: {name} failed: RuntimeError: planted" for name in told]
    found = cells(done)
    assert found["TRADES: None", "pgd20"]["found"]["images"] == 4
    assert found["TRADES: HGD", "pgd20"]["found"] is None
    assert found["TRADES: HGD", "pgd20"]["error"] == "RuntimeError: planted"
    mended = run_job("reproduce", *words, folder=folder)
    assert mended.code == 0, mended.err
    assert mended.out.count("reused: ") == 2  # TRADES' and MART's targets
    found = cells(mended)
    claims = [json.loads(file.read_text()) for file in Path(mended.summary["folder"]).glob("claims/hgd-onto-*.json")]
    objectives = {claim["facts"]["settings"]["run"]["target"]["objective"] for claim in claims}
    assert objectives == {"trades", "mart"}
    assert found["MART: HGD", "pgd20"]["found"]["attack"] == "pgd2"
    assert found["MART: HGD", "pgd20"]["commands"][0].startswith("python jobs/reproduce.py table2 digits_smoke")


@pytest.mark.slow
def test_killed_it_goes_on(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    words = ("table1", "digits_smoke", "--only", "identity,dir", *LOCAL, "--tracking.no-enabled")
    process = start(*words, script="reproduce")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "runs").glob("pretrain-*/final/COMMIT")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_job("reproduce", *words, folder=tmp_path)
    assert done.code == 0, done.err
    assert "pretrain: reused from" in done.out
    assert done.out.count("reused: ") == 1  # None was over


@pytest.mark.slow
def test_on_ray_with_pictures(train: Callable[..., Outcome], tmp_path: Path) -> None:
    words = ("all", "digits_smoke", "--only", "identity,hgd", *FEW, "--tracking.no-enabled")
    done = train(*words, script="reproduce", here=True)
    assert done.code == 0, done.err
    kept = {file.name for file in Path(done.summary["folder"]).iterdir()}
    assert {"fig2.png", "table2.png"} & kept == {"fig2.png"}


def test_what_it_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dircluster.cluster.reproducing.reproduction.factor_for", lambda minutes, found: 0.5)
    monkeypatch.setattr("dircluster.cluster.reproducing.reproduction.TIMED", 0.1)
    words = ("table1", "digits_smoke", "--only", "identity", "--budget", "1", "--dry-run", *LOCAL)
    done = run_job("reproduce", *words, folder=tmp_path)
    assert done.code == 0, done.err
    assert "training, min" in done.out
    assert "judging, min" in done.out
    assert "not foretold: storage, the start and end of each job" in " ".join(done.out.split())
    assert "schedules times 0.5" in " ".join(done.out.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("table9",), "there is no table or figure 'table9'; there are table1, table2, "),
        ((), "say first what to reproduce; there are table1"),
        (("table1", "--what", "table2"), "the first word says table1, and --what table2: give one of them"),
        (
            ("table1", "cifar100"),
            "not all systems have a preset like cifar100: give digits, ",
        ),
        (("table1", "--only", "hdg"), "--only hdg is no system; there are identity, "),
        (("fig6b", "--only", "menet"), "--only menet leaves nothing of fig6b, which has identity, finetune, apegan_a"),
        (("table1", "--dir.alpha", "1"), "dir.alpha is no setting of identity: "),
        (
            ("table1", "--evaluation.suite", "paper"),
            "--evaluation.suite is decided by what is reproduced: ",
        ),
        (("table1", "--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("table1", "--budget", "-1"), "--budget must be positive, got -1"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    done = run_job("reproduce", *words, folder=tmp_path)
    assert done.code == 2
    (error,) = done.error
    assert error.startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []
