"""One trial of a sweep: trained by the actor that Tune starts for it.

How it ended lies in storage, where the sweep finds it; Tune gets held-out accuracies alone, to choose by.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray import tune

from dircluster.cluster.runtime.channel import POLL
from dircluster.cluster.runtime.driver import forget
from dircluster.cluster.runtime.ray_train import Job
from dircluster.cluster.runtime.watch import WAITS
from dircluster.cluster.storage import to_environment
from dircluster.cluster.sweeps.space import Settings, settings_text
from dircluster.cluster.sweeps.store import Failures, result_of, store
from dircluster.cluster.tracking.jobs import Child, JobRecord, finish_job, open_job
from dircluster.cluster.tracking.owners import beating
from dircluster.config import ConfigError, RunConfig, first_line, flatten, varied
from dircluster.evaluation.sweep_table import Trial, accuracies
from dircluster.evaluation.versions import UNKNOWN, each_once
from dircluster.presets import run_from_plain
from dircluster.training.retry import retry
from dircluster.training.stages import find_stage, stage_settings, stages_of

LATEST = 1_000_000
"""The epoch that stands for a trial's end."""
ON_HEAD = {"node:__internal_head__": 0.001}
"""What a trial's actor takes: a place on the head node, which every cluster has."""
METRIC = "held_out"
WAIT = 10.0
"""Seconds until a trial looks again whether a stage that another job trains is free."""


@dataclass(frozen=True)
class Task:
    """One training: settings that differ from the sweep's config, and where it does not go to its end, until which."""

    settings: Settings
    seed: int
    until: str = ""


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share, as plain data that can be sent to their actors."""

    config: dict[str, Any]
    """The run that they vary, see presets.run_to_plain."""
    record: dict[str, Any] | None
    """The sweep's JobRecord."""
    seeds: tuple[int, ...]
    tags: dict[str, str]
    """Of every trial's run in MLflow."""
    retries: int = 0
    at_once: int = 1
    asha: bool = False
    given: frozenset[str] = frozenset()
    """Settings that the command gave: lengths among them do not follow a radius that is varied."""
    owner: str = ""
    """Names the call of Tune."""
    channel: Any = field(default=None)
    """Where its trials find the wish to stop, and leave lines."""

    def tasks_of(self, config: dict[str, Any]) -> list[Task]:
        """What a trial of Tune does: a task, or a point that a search chose, at every seed."""
        return [Task(**config["task"])] if "task" in config else [Task(config, seed) for seed in self.seeds]

    def run_of(self, task: Task) -> RunConfig:
        """The whole run of a task. Raises ConfigError: within a range there may be points that cannot be."""
        return varied(run_from_plain(self.config), {**task.settings, "seed": task.seed}, self.given)

    def child(self, task: Task) -> Child | None:
        """What its run in MLflow is to the sweep's; None where there is no record."""
        if self.record is None:
            return None
        seed = {"seed": task.seed} if len(self.seeds) > 1 else {}
        if not task.until:
            own = {**task.settings, **seed}
            return Child(self.record["run_id"], settings_text(own), own)
        run = self.run_of(task)
        decides = flatten(stage_settings(run, find_stage(run, task.until)))
        decided = {name: value for name, value in task.settings.items() if name in decides}
        name = f"{self.config['run']['name']} shared until {task.until}"
        words = [name, *([settings_text(decided)] if decided else []), f"seed {task.seed}"]
        return Child(self.record["run_id"], ", ".join(words), {}, shared=True)


class Failed(Exception):
    """A trial that did not come to its end; Tune starts it again, as often as it may."""


class Stopped(Exception):
    """The sweep was asked to stop; what the trial did is in its checkpoints."""


class Post:
    """A trial's own console: lines go to the sweep, held-out accuracies to Tune."""

    def __init__(self, channel: Any, stage: str) -> None:
        """``stage`` is the one whose held-out accuracies are reported, none where it is empty."""
        self._channel, self._stage = channel, stage
        self._signal, self._asked, self._judged, self._waits = 0, 0.0, 0, False
        self.last = ""

    def say(self, line: str) -> None:
        """Stacks and tracebacks are passed on, and once that workers are waited for: the sweep shows one quiet table.

        The last line is kept, for a failure that refers to it.
        """
        lines = line.strip().splitlines()
        self.last = lines[-1] if lines else self.last
        waits = line.startswith(WAITS)
        if len(lines) > 1 or (waits and not self._waits):
            ray.get(self._channel.exchange.remote([line], 1))
        self._waits = waits

    def tell(self, event: str | dict[str, Any]) -> None:
        self._waits = False
        if isinstance(event, dict) and event["stage"] == self._stage:
            found = event["held_out"]
            if found and found["step"] > self._judged:
                self._judged = found["step"]
                tune.report({METRIC: found["robust"], "epoch": event["epoch"]})

    def stop_signal(self) -> int:
        if time.monotonic() - self._asked > POLL:
            self._asked = time.monotonic()
            self._signal = ray.get(self._channel.exchange.remote([], 1))
        return self._signal


def train_task(plan: Plan, task: Task, post: Post) -> Trial:
    """Train, judge and keep: -> what came out. Raises Failed, or Stopped."""
    run = plan.run_of(task)
    found = result_of(run, task.until)
    if found is not None:  # perhaps by another sweep, which varied something else
        return replace(found, settings=dict(task.settings), seed=task.seed)
    if post.stop_signal():
        raise Stopped
    to_environment(run.storage)
    owner, began, status = uuid.uuid4().hex, time.monotonic(), "KILLED"
    record = _open_record(plan, task, run, post)
    held = contextlib.ExitStack()
    if record is not None:
        held.enter_context(beating(record.uri, record.run_id))
    try:
        outcome = Job(run, owner, False, post, task.until, patient=True).follow(lambda: record)
        while outcome.get("busy") and not post.stop_signal():  # a stage that another trial needs too
            time.sleep(WAIT)
            outcome = Job(run, owner, False, post, task.until, patient=True).follow(lambda: record)
        status = "KILLED" if outcome.get("busy") else outcome["status"]  # it was stopped while it waited
    finally:
        held.close()
        if record is not None:
            finish_job(record, status)
        forget(run, owner)
    if status != "FINISHED" and post.stop_signal():
        raise Stopped
    if status != "FINISHED":
        error = outcome.get("error", f"stopped by signal {outcome.get('signal')}")
        raise Failed(post.last if error.endswith("stands above") else error)
    rows = outcome.get("results", [])
    natural, robust, marked = accuracies(rows, run.defense, run.attack.norm) or (None, None, False)
    bare = accuracies(rows, "none", run.attack.norm)
    trial = Trial(
        dict(task.settings),
        task.seed,
        "FINISHED",
        (outcome["selection"].get(stages_of(run)[-1].name) or {}).get("robust"),
        natural,
        robust,
        bare and bare[:2],
        time.monotonic() - began,
        outcome.get("checkpoint", ""),
        marked=marked,
        versions=each_once(outcome.get("trained_by", {}) | {"judged": [plan.tags.get("dircluster.commit", UNKNOWN)]}),
    )
    store(run, trial, task.until)
    return trial


def _open_record(plan: Plan, task: Task, run: RunConfig, post: Post) -> JobRecord | None:
    """Its run in MLflow, which may be away for ``tracking.patience`` seconds; afterwards it trains without curves."""
    child = plan.child(task)
    if child is None:
        return None
    try:
        return retry(
            lambda: open_job(run, plan.tags, child=child),
            patience=run.tracking.patience,
            longest_pause=WAIT,
            stopped=lambda: bool(post.stop_signal()),
        )
    except ConfigError:
        return None


def trainable(plan: Plan) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        done, errors = [], []
        run = run_from_plain(plan.config)
        failures, last = Failures(run, plan.owner), stages_of(run)[-1].name if plan.asha else ""
        for task in plan.tasks_of(config):
            try:
                done.append(train_task(plan, task, Post(plan.channel, last)))
            except Stopped:
                return  # as if it were done: Tune must not start it again
            except Exception as error:  # the other seeds go on
                errors.append(error)
                with contextlib.suppress(Exception):  # storage may be what failed
                    failures.add(Trial(dict(task.settings), task.seed, "FAILED", error=first_line(error)))
        if errors:
            raise errors[0]
        scores = [found.held_out for found in done if found.held_out is not None]
        tune.report({METRIC: sum(scores) / len(scores) if scores else 0.0, "epoch": LATEST})

    return trial
