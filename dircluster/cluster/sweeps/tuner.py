"""The trials of a sweep on Ray Tune: each a Ray Train run of its own, followed by a small actor on the head node.

A trial's actor takes no CPU, so that its workers always find theirs; how many trials run at a time is for the caller
to say. How a trial ended lies in storage, where this sweep and the next one find it: Tune's own notes are thrown away.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from dircluster.cluster import storage
from dircluster.cluster.runtime.channel import POLL, WorkerChannel
from dircluster.cluster.runtime.driver import forget
from dircluster.cluster.runtime.watch import GRACE
from dircluster.cluster.sweeps.space import Range, Settings
from dircluster.cluster.sweeps.store import Failures, result_of
from dircluster.cluster.sweeps.trial import LATEST, METRIC, ON_HEAD, Plan, Task, trainable
from dircluster.config import ConfigError, RunConfig, first_line
from dircluster.evaluation.sweep_table import Trial
from dircluster.presets import run_from_plain
from dircluster.training.retry import retry
from dircluster.training.stages import stages_of

if TYPE_CHECKING:
    from dircluster.cluster.console import Terminal


@dataclass(frozen=True)
class _End:
    """That a trial has begun, ended or failed for good."""

    how: str
    name: str
    config: dict[str, Any]
    last: dict[str, Any]
    """What it reported last."""


class _Ends(tune.Callback):
    """Hears in the sweep's own process which trials are over, and how."""

    def __init__(self) -> None:
        self.arrived: deque[_End] = deque()  # Tune pickles it: no locks

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.arrived.append(_End("begun", trial.trial_id, trial.config, {}))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.arrived.append(_End("ended", trial.trial_id, trial.config, dict(trial.last_result or {})))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.arrived.append(_End("failed", trial.trial_id, trial.config, {}))


class _Leave(tune.Stopper):
    """Ends a call of Tune once it is asked to."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.asked


class Tuning:
    """One call of Tune while it lasts: some tasks, or a search."""

    def __init__(
        self,
        plan: Plan,
        terminal: Terminal,
        over: Callable[[Trial], None],
        begun: Callable[[Settings], None] = lambda _: None,
    ) -> None:
        """In the caller's thread, ``over`` hears of every training that is over, ``begun`` of points that a search
        has chosen.
        """
        self.plan, self.terminal, self.over, self.begun = plan, terminal, over, begun
        self.config: RunConfig = run_from_plain(plan.config)
        self.name = f"sweep-{uuid.uuid4().hex}"
        self.errors: list[BaseException] = []
        self.met: set[str] = set()
        """Trials that a search has begun, by Tune's names: it begins one again that failed."""
        self.failures = Failures(self.config, self.name)

    def tasks(self, tasks: Sequence[Task]) -> int:
        """Do ``tasks``; -> the signal that stopped it, or 0."""
        return self._fit({"task": tune.grid_search([asdict(task) for task in tasks])}, None, 1)

    def search(
        self, ranges: Mapping[str, Range], known: Sequence[tuple[Settings, float]], begun: int, points: int
    ) -> int:
        """Try points that Optuna chooses, until they are ``points`` with those ``begun`` before, knowing what they
        gave; -> the signal that stopped it, or 0.
        """
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {name: _distribution(values) for name, values in ranges.items()}
        chooser = OptunaSearch(
            metric=METRIC,
            mode="max",
            seed=self.config.seed + begun,  # after a resumption, not the same points again
            points_to_evaluate=[dict(settings) for settings, _ in known] or None,
            evaluated_rewards=[score for _, score in known] or None,
        )
        return self._fit(space, chooser, points - begun)

    def _fit(self, space: dict[str, Any], chooser: Any, samples: int) -> int:
        quiet = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
        os.environ.update({name: value for name, value in quiet.items() if name not in os.environ})
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what failed is shown in a line
        channel, ends, leave = (
            ray.remote(num_cpus=0)(WorkerChannel).options(resources=ON_HEAD).remote(),
            _Ends(),
            _Leave(),
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable(replace(self.plan, owner=self.name, channel=channel)), ON_HEAD),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=chooser,
                scheduler=self._scheduler(),
                num_samples=samples,
                max_concurrent_trials=self.plan.at_once,
            ),
            run_config=tune.RunConfig(
                name=self.name,
                failure_config=tune.FailureConfig(max_failures=self.plan.retries),
                callbacks=[ends],
                stop=leave,
                verbose=0,
                **storage.for_ray(self.config),
            ),
        )
        fitting = threading.Thread(target=self._run, args=(tuner,), name="ray-tune", daemon=True)
        fitting.start()  # outside the main thread Ray leaves the signals alone
        try:
            return self._follow(fitting, channel, ends)
        finally:
            leave.asked = True
            fitting.join(GRACE)
            forget(self.config, self.name)

    def _scheduler(self) -> TrialScheduler | None:
        if not self.plan.asha:
            return None
        grace = max(self.config.training.select_every, stages_of(self.config)[-1].epochs // 8)
        return ASHAScheduler(
            time_attr="epoch",
            max_t=LATEST,
            grace_period=grace,
            reduction_factor=2,
            stop_last_trials=False,  # or resumed trials would raise the bar for those that begin
        )

    def _run(self, tuner: tune.Tuner) -> None:
        try:
            tuner.fit()
        except BaseException as error:  # reported by _follow, in the main thread
            self.errors.append(error)

    def _follow(self, fitting: threading.Thread, channel: Any, ends: _Ends) -> int:
        busy: set[str] = set()
        asked = 0.0
        while True:
            alive, signal = fitting.is_alive(), self.terminal.stop_signal()
            arrived = [ends.arrived.popleft() for _ in range(len(ends.arrived))]
            for line in ray.get(channel.collect.remote(signal)).events:
                self.terminal.say(line)
            for begun in (end for end in arrived if end.how == "begun" and not asked):  # later ones do nothing
                busy.add(begun.name)
                if "task" not in begun.config and begun.name not in self.met:
                    self.met.add(begun.name)
                    self.begun(begun.config)
            for ended in (end for end in arrived if end.how != "begun"):
                busy.discard(ended.name)
                for task in self.plan.tasks_of(ended.config):
                    if not signal:  # what is stopped has neither failed nor ended
                        self.over(self._outcome(task, ended))
            if signal:
                asked = asked or time.monotonic()
                if not busy or time.monotonic() - asked > GRACE + 5:  # each has committed a checkpoint
                    return signal
            if not alive:
                if self.errors and not signal:
                    raise self.errors[0]
                return signal
            time.sleep(POLL)

    def _outcome(self, task: Task, end: _End) -> Trial:
        """How a task of a trial ended that Tune has done with."""
        unknown = Trial(dict(task.settings), task.seed, "FAILED", error="its process ended without a word")
        try:
            run = self.plan.run_of(task)
        except ConfigError as error:
            return replace(unknown, error=first_line(error))

        def read() -> tuple[Trial | None, Trial | None]:
            return result_of(run, task.until), self.failures.of(task.settings, task.seed)

        patience = self.config.storage.patience
        found, failure = retry(read, patience=patience, stopped=lambda: bool(self.terminal.stop_signal()))
        if found is not None:
            return replace(found, settings=dict(task.settings), seed=task.seed)
        if end.how == "ended" and self.plan.asha:
            return replace(unknown, status="STOPPED", held_out=end.last.get(METRIC), error="")
        return failure or unknown


def _distribution(values: Range) -> Any:
    if isinstance(values, list):
        return tune.choice(values)
    low, high, *log = values
    if isinstance(low, int) and isinstance(high, int):
        return tune.lograndint(low, high + 1) if log else tune.randint(low, high + 1)
    return tune.loguniform(low, high) if log else tune.uniform(low, high)
