"""Records whose process is gone, whose folder was moved, whose disk is full, and which two jobs begin at once."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from dircluster.cluster.tracking import jobs, owners
from dircluster.cluster.tracking.jobs import (
    FOLDER_TAG,
    JobRecord,
    _mlflow_tags,
    default_uri,
    experiment_of,
    finish_job,
    hand_back,
    log_files,
    open_job,
    record_evaluation,
    record_rows,
    search_runs,
)
from dircluster.cluster.tracking.owners import BEAT_TAG, DEAD, OWNER_TAG, _start, close_abandoned, is_gone, this_process
from dircluster.cluster.tracking.sqlite_record import MOVED_TAG, opening
from dircluster.cluster.tracking.tracker import MlflowTracker, is_full
from dircluster.config import ConfigError, with_values
from dircluster.presets.dir import DirRun
from tests.conftest import wait_until

ELSEWHERE = "another-boot/pid:[1] 7 1234"


def test_a_process_is_known_by_its_start_and_by_its_signs_of_life() -> None:
    place, pid, start = this_process().split(" ")
    assert not is_gone(this_process(), "", 0.0)
    assert is_gone(f"{place} {pid} {int(start) - 1}", "", 0.0)  # another one of that number
    with subprocess.Popen(["sleep", "600"]) as other:
        try:
            owner = f"{place} {other.pid} {_start(other.pid)}"
            assert not is_gone(owner, "", 0.0)
        finally:
            other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is left for somebody to wait for
        assert is_gone(owner, "", 0.0)
    assert is_gone(owner, "", 0.0)
    assert not is_gone(ELSEWHERE, "", 1e9)  # nothing is known of it
    assert not is_gone(ELSEWHERE, "1000", 1000 + DEAD - 1)
    assert is_gone(ELSEWHERE, "1000", 1000 + DEAD + 1)


class ByTwos(MlflowClient):
    """MLflow's client, whose pages hold two."""

    def search_runs(self, *words: Any, **options: Any) -> Any:
        return super().search_runs(*words, max_results=2, **options)


def test_runs_without_a_process_are_closed_and_others_are_not(tmp_path: Path) -> None:
    mine, now = this_process(), time.time()
    tags = {
        "mine": {OWNER_TAG: mine},
        "gone": {OWNER_TAG: f"{mine}0"},
        "silent": {OWNER_TAG: f"{ELSEWHERE}1", BEAT_TAG: f"{now - 2 * DEAD}"},
        "busy": {OWNER_TAG: f"{ELSEWHERE}2", BEAT_TAG: f"{now - 60}"},
        "unknown": {OWNER_TAG: f"{ELSEWHERE}3"},
        "foreign": {OWNER_TAG: "somebody else's"},
        "gone too": {OWNER_TAG: f"{mine}1"},
        "stage": {OWNER_TAG: f"{ELSEWHERE}0"},  # of a process whose signs of life are with its job
        "its job": {OWNER_TAG: f"{ELSEWHERE}0", BEAT_TAG: f"{now - 2 * DEAD}"},
    }
    client = ByTwos(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = {name: client.create_run("0", run_name=name, tags=each).info.run_id for name, each in tags.items()}
    closed = {"gone", "gone too", "silent", "stage", "its job"}
    assert set(close_abandoned(client, ["0"])) == closed
    status = {name: client.get_run(run).info.status for name, run in runs.items()}
    assert status == {name: "KILLED" if name in closed else "RUNNING" for name in tags}


def test_an_experiment_that_another_job_makes_at_the_same_time_is_shared(smoke: DirRun, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = MlflowClient(uri).create_experiment(smoke.tracking.experiment)

    class Late(MlflowClient):
        """Looks before the other job makes it, and once more."""

        looked = False

        def get_experiment_by_name(self, name: str) -> Any:
            self.looked, first = True, not self.looked
            return None if first else super().get_experiment_by_name(name)

    assert experiment_of(Late(uri), smoke, uri) == made


def test_a_job_that_goes_on_has_not_the_signs_of_life_of_the_process_before_it(
    smoke: DirRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # in place of a server: signs of life are given there
    server = dataclasses.replace(smoke.tracking, uri=f"file://{tmp_path / 'server'}")
    run = dataclasses.replace(smoke, tracking=server)
    before = open_job(run, {})
    client = MlflowClient(before.uri)
    client.set_tag(before.run_id, BEAT_TAG, f"{time.time() - 2 * DEAD}")
    finish_job(before, "KILLED")
    record = open_job(run, {})
    assert record.run_id == before.run_id
    monkeypatch.setattr(owners, "_place", lambda: "another-machine")
    assert close_abandoned(client, [record.experiment_id]) == []
    with owners.beating(record.uri, record.run_id):
        wait_until(lambda: BEAT_TAG in client.get_run(record.run_id).data.tags)
    assert time.time() - float(client.get_run(record.run_id).data.tags[BEAT_TAG]) < DEAD


def test_a_run_whose_end_mlflow_cannot_be_told_is_named(smoke: DirRun) -> None:
    Path(smoke.storage.uri).mkdir()
    record, said = open_job(smoke, {}), list[str]()
    finish_job(dataclasses.replace(record, uri="sqlite:////dev/null/record.db"), "FINISHED", said.append)
    (line,) = said
    assert line.startswith(f"MLflow still has run {record.run_id} as RUNNING, which is FINISHED: ")
    finish_job(record, "FINISHED", said.append)
    assert said == [line]
    assert MlflowClient(record.uri).get_run(record.run_id).info.status == "FINISHED"


def test_a_run_that_another_job_works_on_is_left_to_it(
    smoke: DirRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(smoke.storage.uri).mkdir()
    with monkeypatch.context() as another:
        another.setattr(jobs, "this_process", lambda: f"{ELSEWHERE}1")
        first = open_job(smoke, {})
    second = open_job(smoke, {})
    client = MlflowClient(second.uri)
    assert (second.run_id, second.before) == (first.run_id, first.owner)
    hand_back(second)
    run = client.get_run(first.run_id)
    assert (run.info.status, run.data.tags[OWNER_TAG]) == ("RUNNING", first.owner)
    finish_job(first, "FINISHED")
    again = open_job(smoke, {})
    assert again.before == ""
    hand_back(again)
    assert client.get_run(first.run_id).info.status == "FAILED"


def test_an_evaluation_whose_report_cannot_be_recorded_has_failed(smoke: DirRun) -> None:
    row = {"defense": "dir", "attack": "natural", "randomness": "fresh", "accuracy": 0.5, "total": 16, "epsilon": 0.0}
    found = {"rows": [row], "suite": "quick", "verdict": []}
    facts = {"defense": "dir", "data": "0", "commit": "unknown"}
    Path(smoke.storage.uri).mkdir()
    with pytest.raises(ConfigError, match=r"cannot be used.*gone\.html"):
        record_evaluation(smoke, facts, found, [Path("gone.html")])
    client = MlflowClient(default_uri(smoke))
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "FAILED"
    assert run.data.tags[OWNER_TAG] == this_process()


def test_a_run_shows_what_rows_say_now(smoke: DirRun) -> None:
    """Attacks of other code may leave less; what has not changed is no second point."""
    row = {"defense": "dir", "attack": "natural", "randomness": "fresh", "accuracy": 0.5, "total": 16, "epsilon": 0.0}
    attacked = {**row, "attack": "pgd20", "epsilon": 0.1, "norm": "linf", "average": 1, "interval": [0.1, 0.6]}
    Path(smoke.storage.uri).mkdir()
    record = open_job(smoke, {})
    for left in (0.375, 0.25, 0.25):
        record_rows(record, smoke, "0", [row, {**attacked, "accuracy": left}])
    client = MlflowClient(record.uri)

    def history(name: str) -> list[float]:
        return [point.value for point in client.get_metric_history(record.run_id, name)]

    assert history("robust_accuracy") == history("test/dir/pgd20/fresh") == [0.375, 0.25]
    assert history("natural_accuracy") == [0.5]


def written(folder: Path, said: str) -> Path:
    """A record in ``folder`` that speaks of the folder ``said``."""
    folder.mkdir()
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as base, base:
        base.executescript(
            "CREATE TABLE experiments (experiment_id INTEGER, artifact_location VARCHAR(256));"
            "CREATE TABLE experiment_tags (key VARCHAR(250), value VARCHAR(5000), experiment_id INTEGER,"
            " PRIMARY KEY (key, experiment_id));"
            "CREATE TABLE runs (artifact_uri VARCHAR(200)); CREATE TABLE tags (value VARCHAR(8000));"
        )
        base.execute("INSERT INTO experiments VALUES (0, 'mlflow-artifacts:/0'), (1, ?)", (f"{said}/artifacts",))
        base.execute("INSERT INTO runs VALUES (?), (?)", (f"{said}/artifacts/1", f"{said}-other/artifacts/1"))
        base.execute("INSERT INTO tags VALUES (?), ('a word')", (said,))
    return folder


def rows(folder: Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as base:
        return [row[0] for row in base.execute(query)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder whose record is made once: MLflow takes seconds to make one."""
    return str(tmp_path_factory.mktemp("storage"))


@pytest.mark.parametrize(
    ("sweep", "name"),
    [
        (None, "digits_smoke-seed2"),
        ({"space": "depth", "varied": [], "seeds": 1}, "digits_smoke-depth-seed2"),
        ({"space": "depth", "varied": [], "seeds": 3}, "digits_smoke-depth-seeds2-4"),
    ],
)
def test_a_record_shows_its_seeds_and_its_script(
    smoke: DirRun, storage: str, sweep: dict[str, Any] | None, name: str
) -> None:
    command = "python jobs/tune_depth.py digits_smoke --storage.uri /some/place --seed 2"
    recorded = with_values(smoke, {"seed": 2, "storage.uri": storage})
    record = open_job(recorded, {"dircluster.command": command}, sweep=sweep)
    run = MlflowClient(record.uri).get_run(record.run_id)
    assert run.info.run_name == name
    assert run.data.tags["mlflow.source.name"] == "jobs/tune_depth.py"  # a page shows what stands behind the last slash
    assert run.data.tags["dircluster.command"] == command


def test_runs_are_found_by_any_text(tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    texts = ("/a/folder", "/a/b's", "/a/b_s", """/a/'b's" \\ folder/""")
    runs = {text: client.create_run("0", tags={FOLDER_TAG: text}).info.run_id for text in texts}
    assert {text: search_runs(client, "0", FOLDER_TAG, text) for text in texts} == {n: [r] for n, r in runs.items()}
    assert search_runs(client, "0", FOLDER_TAG, "/a") == []


@pytest.mark.parametrize("script", ["/a folder/jobs/evaluate.py", ""], ids=["blank", "interpreter"])
def test_without_a_command_the_script_is_that_of_the_process(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "digits"])
    assert _mlflow_tags({})["mlflow.source.name"] == script


def test_a_record_follows_its_folder(tmp_path: Path) -> None:
    folder = written(tmp_path / "new", "/gone/it's 100%/old")
    for _ in range(2):
        with opening(f"sqlite:///{folder}/mlflow.db", str(folder)):
            pass
    assert rows(folder, "SELECT artifact_location FROM experiments") == ["mlflow-artifacts:/0", f"{folder}/artifacts"]
    artifacts = [f"{folder}/artifacts/1", "/gone/it's 100%/old-other/artifacts/1"]
    assert rows(folder, "SELECT artifact_uri FROM runs") == artifacts
    assert rows(folder, "SELECT value FROM tags") == [str(folder), "a word"]
    tags = rows(folder, f"SELECT value FROM experiment_tags WHERE key = '{MOVED_TAG}'")
    assert [json.loads(value) for value in tags] == [["/gone/it's 100%/old"]]


def test_a_record_elsewhere_and_one_by_another_name_are_left_alone(tmp_path: Path) -> None:
    folder = written(tmp_path / "real", str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(folder)
    with opening(f"sqlite:///{folder}/mlflow.db", str(folder)):
        pass
    with opening(f"sqlite:///{folder}/mlflow.db", str(tmp_path)), opening("http://127.0.0.1:9", "s3://bucket"):
        pass
    assert rows(folder, "SELECT value FROM tags") == [str(tmp_path / "link"), "a word"]


def test_artifacts_that_were_meant_to_lie_elsewhere_stay_there(tmp_path: Path) -> None:
    (tmp_path / "other" / "artifacts").mkdir(parents=True)
    folder = written(tmp_path / "record", str(tmp_path / "other"))
    with opening(f"sqlite:///{folder}/mlflow.db", str(folder)):
        pass
    assert rows(folder, "SELECT value FROM tags") == [str(tmp_path / "other"), "a word"]


def wrapped(inner: Exception) -> Exception:
    try:
        raise MlflowException("INTERNAL_ERROR") from inner
    except MlflowException as error:
        return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (wrapped(sqlite3.OperationalError("database or disk is full")), True),
        (MlflowException("(sqlite3.OperationalError) database or disk is full [SQL: ...]"), True),
        (wrapped(ConnectionError("no server")), False),
        (None, False),
    ],
)
def test_a_full_disk_is_known_and_not_waited_for(error: Exception | None, full: bool, tmp_path: Path) -> None:
    assert is_full(error) == full
    lines: list[str] = []
    tracker = MlflowTracker(JobRecord("sqlite:///none", "0", "run", "runs", 600.0), lines.append)
    waited: list[float] = []
    tracker.queue.close = lambda patience: waited.append(patience) or 0  # type: ignore[func-returns-value]
    if error is not None:
        tracker.queue._items.append(print)
        tracker.queue._complain(error)
        assert ("is full: training goes on" in lines[0]) == full
    tracker.close()
    assert waited == [10.0 if full else 600.0]


BEGIN = """
import dataclasses, sys
from dircluster.presets import preset
from dircluster.cluster.tracking.jobs import open_job
run = preset("digits_smoke")
run = dataclasses.replace(run, seed=int(sys.argv[2]), storage=dataclasses.replace(run.storage, uri=sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(open_job(run, {"dircluster.commit": 40 * "a"}).run_id)
"""


@pytest.mark.long
def test_two_jobs_begin_at_once_are_gone_and_are_found_again_where_their_folder_was_moved(
    smoke: DirRun, root: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    words = [sys.executable, "-c", BEGIN, str(old)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both: list[Any] = [subprocess.Popen([*words, seed], cwd=root, **pipes) for seed in ("0", "1")]
    try:
        assert [process.stdout.readline() for process in both] == ["ready\n", "ready\n"]
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        runs = [process.communicate(timeout=300)[0].strip() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0]
    assert len(set(runs)) == 2
    shutil.move(old, new)
    moved = dataclasses.replace(smoke, storage=dataclasses.replace(smoke.storage, uri=str(new)))
    record = open_job(moved, {"dircluster.commit": "unknown"})
    log_files(record, {"note.md": "here"})
    client = MlflowClient(record.uri)
    assert record.run_id == runs[0]
    assert client.get_run(runs[1]).info.status == "KILLED"
    tags = client.get_run(runs[1]).data.tags
    assert tags["mlflow.source.git.commit"] == 40 * "a"
    assert "mlflow.user" in tags
    finish_job(record, "FINISHED")
    assert [file.name for file in new.rglob("note.md")] == ["note.md"]
    assert not old.exists()
    assert os.getpid() == int(client.get_run(record.run_id).data.tags[OWNER_TAG].split(" ")[1])
