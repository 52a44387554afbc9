"""One trial: found, trained, waiting for another's stage, stopped, failed; and what Tune and the sweep are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dircluster.cluster.runtime.channel import WorkerChannel
from dircluster.cluster.sweeps import trial as module
from dircluster.cluster.sweeps.store import Failures, result_of, store
from dircluster.cluster.sweeps.trial import (
    LATEST,
    METRIC,
    WAIT,
    Failed,
    Plan,
    Post,
    Stopped,
    Task,
    train_task,
    trainable,
)
from dircluster.config import ConfigError, RunConfig, TrackingConfig
from dircluster.evaluation.sweep_table import Trial
from dircluster.presets import preset, run_from_plain, run_to_plain
from dircluster.training import retry
from tests.unit.cluster.conftest import Actor, Clock

ALPHA = {"dir.alpha": 2.0}
TASK = Task(ALPHA, 0)
ROWS = [
    {"defense": defense, "attack": attack, "randomness": randomness, "accuracy": accuracy, "mean": accuracy}
    | {"epsilon": 0.0 if attack == "natural" else 0.15, "norm": "linf", "average": 1, "marks": []}
    for defense, attack, randomness, accuracy in (
        ("none", "natural", "none", 0.9),
        ("none", "pgd2", "none", 0.3),
        ("dir", "natural", "fresh", 0.8),
        ("dir", "pgd2", "fixed", 0.5),
        ("dir", "pgd2", "fresh", 0.4),
    )
]
DONE = {"status": "FINISHED", "results": ROWS, "selection": {"dir": {"robust": 0.6}}, "checkpoint": "final"}
BUSY = {"status": "FAILED", "error": "another job is training it", "exit": 2, "busy": True}


class Cluster:
    """In place of runs on Ray: outcomes by seed, one a run; what was run, recorded and forgotten."""

    def __init__(self) -> None:
        self.outcomes: dict[int, list[dict[str, Any] | Exception]] = {}
        self.ran: list[tuple[int, str]] = []
        self.records: list[Any] = []
        self.forgotten = 0
        self.lines: list[str] = []

    def job(self, run: RunConfig, owner: str, fresh: bool, post: Post, until: str, patient: bool) -> Any:
        assert patient  # others hold what the cluster has

        def follow(record: Callable[[], Any]) -> dict[str, Any]:
            self.ran.append((run.seed, until))
            for line in self.lines:
                post.say(line)
            outcome = self.outcomes[run.seed].pop(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return SimpleNamespace(follow=follow)

    def forget(self, run: RunConfig, owner: str) -> None:
        self.forgotten += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, clock: Clock, no_ray: Callable[..., None]) -> Cluster:
    made = Cluster()
    no_ray(module)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(module, "Job", made.job)
    monkeypatch.setattr(module, "forget", made.forget)
    monkeypatch.setattr(module, "finish_job", lambda record, status: made.records.append((record, status)))
    return made


@pytest.fixture
def channel(clock: Clock) -> WorkerChannel:
    return WorkerChannel(clock)


@pytest.fixture
def plan(tmp_path: Path, channel: WorkerChannel) -> Plan:
    run = preset("digits_smoke")
    run = replace(run, storage=replace(run.storage, uri=str(tmp_path / "runs")), tracking=TrackingConfig(enabled=False))
    return Plan(run_to_plain(run), None, (0, 1), {}, channel=Actor(channel))


@pytest.fixture
def post(plan: Plan) -> Post:
    return Post(plan.channel, stage="")


def test_a_trial_is_trained_and_stored(cluster: Cluster, plan: Plan, post: Post) -> None:
    cluster.outcomes = {0: [DONE]}
    found = train_task(plan, TASK, post)
    assert (found.status, found.held_out, found.natural, found.robust) == ("FINISHED", 0.6, 0.8, 0.4)
    assert (found.bare, found.checkpoint, dict(found.settings)) == ((0.9, 0.3), "final", ALPHA)
    kept = result_of(plan.run_of(TASK))
    assert kept is not None
    assert kept.robust == 0.4
    assert cluster.forgotten == 1
    assert not found.marked


def test_a_trial_names_the_versions_of_the_code_behind_it(cluster: Cluster, plan: Plan, post: Post) -> None:
    cluster.outcomes = {0: [DONE | {"trained_by": {"target": ["a"], "pretrain": [], "dir": ["b"]}}]}
    found = train_task(replace(plan, tags={"dircluster.commit": "c"}), TASK, post)
    assert found.versions == ["a", "unknown", "b", "c"]
    kept = result_of(plan.run_of(TASK))
    assert kept is not None
    assert kept.versions == found.versions


def test_a_trial_whose_strongest_row_is_marked_says_so(cluster: Cluster, plan: Plan, post: Post) -> None:
    marks = [{"kind": "slope", "share": 0.5}]
    for number, row in enumerate(ROWS):
        rows = [*ROWS[:number], row | {"marks": marks}, *ROWS[number + 1 :]]
        cluster.outcomes = {seed: [DONE | {"results": rows}] for seed in (number,)}
        assert train_task(plan, Task(ALPHA, number), post).marked == (row["accuracy"] == 0.4)


def test_what_was_found_before_is_not_trained(cluster: Cluster, plan: Plan, post: Post) -> None:
    store(plan.run_of(TASK), Trial({"other": 1}, 7, "FINISHED", 0.5))
    found = train_task(plan, TASK, post)
    assert (found.held_out, found.settings, found.seed) == (0.5, ALPHA, 0)
    assert cluster.ran == []


def test_a_trial_that_is_stopped_while_it_waits_was_killed(
    cluster: Cluster, plan: Plan, post: Post, channel: WorkerChannel, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_open_record", lambda *_: SimpleNamespace(uri="sqlite://", run_id=""))
    cluster.outcomes = {0: [BUSY, BUSY, BUSY]}
    clock.after(WAIT, lambda: channel.collect(15))
    with pytest.raises(Stopped):
        train_task(plan, TASK, post)
    assert [status for _, status in cluster.records] == ["KILLED"]


def test_a_stage_that_another_trial_trains_is_waited_for(
    cluster: Cluster, plan: Plan, post: Post, clock: Clock
) -> None:
    cluster.outcomes = {0: [BUSY, BUSY, DONE]}
    began = clock.now
    assert train_task(plan, TASK, post).status == "FINISHED"
    assert clock.now - began == 2 * WAIT
    assert len(cluster.ran) == 3


def test_who_waits_can_be_stopped(
    cluster: Cluster, plan: Plan, post: Post, clock: Clock, channel: WorkerChannel
) -> None:
    cluster.outcomes = {0: [BUSY, BUSY, DONE]}
    clock.after(WAIT, lambda: channel.collect(15) and None)
    with pytest.raises(Stopped):
        train_task(plan, TASK, post)
    assert len(cluster.ran) == 2
    assert cluster.forgotten == 1


def test_a_sweep_that_was_stopped_begins_no_trial(
    cluster: Cluster, plan: Plan, post: Post, channel: WorkerChannel
) -> None:
    channel.collect(2)
    with pytest.raises(Stopped):
        train_task(plan, TASK, post)
    assert cluster.ran == []


def test_a_trial_that_was_stopped_returns_so_that_tune_does_not_begin_it_again(
    cluster: Cluster, plan: Plan, channel: WorkerChannel, clock: Clock, reported: list[dict[str, Any]]
) -> None:
    cluster.outcomes = {0: [BUSY, {"status": "KILLED", "signal": 15}]}
    clock.after(WAIT, lambda: channel.collect(15) and None)
    trainable(plan)(ALPHA)
    assert reported == []
    assert trials(plan) == []


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        ({"status": "KILLED", "signal": 15}, "stopped by signal 15"),
        ({"status": "FAILED", "error": "dir: loss is not finite", "exit": 1}, "dir: loss is not finite"),
        ({"status": "FAILED", "error": "Ray Train gave up; the reason stands above", "exit": 1}, "OSError: no space"),
    ],
)
def test_a_trial_that_does_not_finish_says_why(
    cluster: Cluster, plan: Plan, post: Post, outcome: dict[str, Any], message: str
) -> None:
    cluster.outcomes, cluster.lines = {0: [outcome]}, ["Traceback\n  somewhere\nOSError: no space\n"]
    with pytest.raises(Failed) as failure:
        train_task(plan, TASK, post)
    assert str(failure.value) == message
    assert result_of(plan.run_of(TASK)) is None
    assert cluster.forgotten == 1


class Record(str):
    """A record by its name, in a file."""

    uri, run_id = "sqlite:///record", "run"


class Server:
    """MLflow, which does not answer for the first so many times."""

    def __init__(self, away: int) -> None:
        self.away = away

    def open(self, run: RunConfig, tags: Mapping[str, str], child: Any) -> Record:
        self.away -= 1
        if self.away >= 0:
            raise ConfigError("does not answer")
        return Record(f"record of {child.name}")


@pytest.mark.parametrize(
    ("away", "records"),
    [(0, [("record of alpha 2, seed 0", "FINISHED")]), (3, [("record of alpha 2, seed 0", "FINISHED")]), (99, [])],
)
def test_a_record_is_waited_for_and_then_done_without(
    cluster: Cluster,
    plan: Plan,
    post: Post,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    away: int,
    records: list[Any],
) -> None:
    cluster.outcomes, began = {0: [DONE]}, clock.now
    monkeypatch.setattr(module, "open_job", Server(away).open)
    train_task(replace(plan, record={"run_id": "sweep"}), TASK, post)
    assert cluster.records == records
    patience = run_from_plain(plan.config).tracking.patience
    waited = clock.now - began
    assert (0 if records else patience - WAIT) <= waited <= min(away * WAIT, patience + WAIT)


def test_a_record_is_marked_failed_when_the_cluster_goes(
    cluster: Cluster, plan: Plan, post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_job", Server(0).open)
    cluster.outcomes = {0: [RuntimeError("the actor is gone")]}
    with pytest.raises(RuntimeError):
        train_task(replace(plan, record={"run_id": "sweep"}), TASK, post)
    assert [status for _, status in cluster.records] == ["KILLED"]
    assert cluster.forgotten == 1


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Tune is told."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "tune", SimpleNamespace(report=found.append))
    return found


def trials(plan: Plan, until: str = "") -> list[tuple[int, str, str]]:
    """What the sweep finds in storage: seed, status and error of each training."""
    failures = Failures(run_from_plain(plan.config), plan.owner)
    found = [result_of(plan.run_of(Task(ALPHA, seed)), until) or failures.of(ALPHA, seed) for seed in plan.seeds]
    return [(trial.seed, trial.status, trial.error) for trial in found if trial is not None]


def test_a_point_is_trained_at_every_seed(
    cluster: Cluster, plan: Plan, channel: WorkerChannel, reported: list[dict[str, Any]]
) -> None:
    other = {**DONE, "selection": {"dir": {"robust": 0.4}}}
    cluster.outcomes = {0: [DONE], 1: [other]}
    trainable(plan)(ALPHA)
    assert trials(plan) == [(0, "FINISHED", ""), (1, "FINISHED", "")]
    assert reported == [{METRIC: 0.5, "epoch": LATEST}]


def test_a_seed_that_fails_does_not_keep_the_others_from_training(
    cluster: Cluster, plan: Plan, channel: WorkerChannel, reported: list[dict[str, Any]]
) -> None:
    cluster.outcomes = {0: [ValueError("first\nsecond line")], 1: [DONE]}
    with pytest.raises(ValueError, match="first"):
        trainable(plan)(ALPHA)
    assert trials(plan) == [(0, "FAILED", "first"), (1, "FINISHED", "")]
    assert reported == []  # Tune begins it again, where it may
    cluster.outcomes = {0: [DONE]}
    trainable(plan)(ALPHA)
    assert cluster.ran == [(0, ""), (1, ""), (0, "")]  # the one that was finished is found
    assert len(reported) == 1


def test_a_task_is_done_at_its_own_seed_until_its_stage(
    cluster: Cluster, plan: Plan, channel: WorkerChannel, reported: list[dict[str, Any]]
) -> None:
    cluster.outcomes = {1: [{"status": "FINISHED", "selection": {}}]}
    trainable(plan)({"task": {"settings": ALPHA, "seed": 1, "until": "pretrain"}})
    assert cluster.ran == [(1, "pretrain")]
    assert trials(plan, "pretrain") == [(1, "FINISHED", "")]
    assert reported == [{METRIC: 0.0, "epoch": LATEST}]


def status(epoch: int, step: int, robust: float, stage: str = "dir") -> dict[str, Any]:
    return {"stage": stage, "epoch": epoch, "held_out": {"step": step, "robust": robust}}


def test_held_out_accuracies_are_reported_once_each(plan: Plan, reported: list[dict[str, Any]]) -> None:
    post = Post(plan.channel, stage="dir")
    post.tell(status(1, 4, 0.9, stage="target"))
    post.tell({"stage": "dir", "epoch": 1, "held_out": {}})
    for epoch, step in ((1, 4), (1, 4), (2, 8)):
        post.tell(status(epoch, step, 0.1 * epoch))
    post.tell("a line")
    assert reported == [{METRIC: 0.1, "epoch": 1}, {METRIC: 0.2, "epoch": 2}]
    reported.clear()
    Post(plan.channel, stage="").tell(status(1, 4, 0.5))
    assert reported == []


def test_that_workers_are_waited_for_is_passed_on_once(
    plan: Plan, channel: WorkerChannel, no_ray: Callable[..., None]
) -> None:
    no_ray(module)
    post, line = Post(plan.channel, stage=""), "waiting for 2 workers: 0 CPUs of the cluster are free"
    post.say(line)
    post.say(line)
    assert channel.collect(0).events == [line]
    post.tell({"stage": "dir", "held_out": {}})
    post.say(line)
    assert channel.collect(0).events == [line]


def test_only_what_has_several_lines_is_passed_on(
    plan: Plan, channel: WorkerChannel, no_ray: Callable[..., None]
) -> None:
    no_ray(module)
    post = Post(plan.channel, stage="")
    post.say("dir: resuming at step 4")
    post.say("worker 0: stack\n  frame")
    assert channel.collect(0).events == ["worker 0: stack\n  frame"]
    assert post.last.strip() == "frame"
