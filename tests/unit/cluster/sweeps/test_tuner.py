"""What a sweep makes of its trials: over, stopped early, ended without a word, tried again; and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dircluster.cluster.runtime.channel import POLL, WorkerChannel
from dircluster.cluster.runtime.watch import GRACE
from dircluster.cluster.sweeps import tuner as module
from dircluster.cluster.sweeps.store import store
from dircluster.cluster.sweeps.trial import METRIC, Plan, Task
from dircluster.cluster.sweeps.tuner import Tuning, _Ends
from dircluster.evaluation.sweep_table import Trial
from dircluster.presets import preset, run_to_plain
from dircluster.training import retry
from tests.unit.cluster.conftest import Actor, Clock, Terminal

ALPHA = {"dir.alpha": 2.0}
OTHER = {"dir.alpha": 1.0}


class Tune:
    """Trials of Tune that do what a test has them do, and a sweep that follows them."""

    def __init__(self, plan: Plan, clock: Clock, terminal: Terminal) -> None:
        self.clock, self.channel, self.ends = clock, WorkerChannel(clock), _Ends()
        self.alive = True
        self.over: list[Trial] = []
        self.points: list[Any] = []
        self.tuning = Tuning(plan, terminal, self.over.append, self.points.append)  # type: ignore[arg-type]

    def begin(self, config: dict[str, Any], name: str) -> None:
        self.ends.on_trial_start(0, [], SimpleNamespace(trial_id=name, config=config))

    def tell(self, trial: Trial) -> None:
        """A trial's actor leaves in storage how a training ended."""
        if trial.status == "FINISHED":
            store(self.tuning.plan.run_of(Task(trial.settings, trial.seed)), trial)
        else:
            self.tuning.failures.add(trial)

    def complete(self, config: dict[str, Any], name: str, **last: Any) -> None:
        self.ends.on_trial_complete(0, [], SimpleNamespace(trial_id=name, config=config, last_result=last))

    def error(self, config: dict[str, Any], name: str) -> None:
        self.ends.on_trial_error(0, [], SimpleNamespace(trial_id=name, config=config))

    def end(self) -> None:
        self.alive = False

    def follow(self) -> int:
        return self.tuning._follow(SimpleNamespace(is_alive=lambda: self.alive), Actor(self.channel), self.ends)  # type: ignore[arg-type]

    @property
    def endings(self) -> list[tuple[dict[str, Any], int, str, str]]:
        return [(dict(trial.settings), trial.seed, trial.status, trial.error) for trial in self.over]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    run = preset("digits_smoke")
    return Plan(run_to_plain(replace(run, storage=replace(run.storage, uri=str(tmp_path / "runs")))), None, (0, 1), {})


@pytest.fixture
def tune(
    plan: Plan, clock: Clock, terminal: Terminal, no_ray: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Tune:
    no_ray(module)
    monkeypatch.setattr(module, "time", clock)
    return Tune(plan, clock, terminal)


def task(settings: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    return {"task": asdict(Task(settings, seed))}


def test_trainings_that_finish_are_over_once_tune_has_done_with_them(tune: Tune) -> None:
    tune.begin(task(ALPHA), "a")
    tune.tell(Trial(ALPHA, 0, "FINISHED", 0.5))
    tune.clock.after(5, lambda: tune.complete(task(ALPHA), "a"))
    tune.clock.after(6, tune.end)
    assert tune.follow() == 0
    assert tune.endings == [(ALPHA, 0, "FINISHED", "")]
    assert tune.points == []  # nothing was searched


def test_a_failure_counts_once_tune_has_given_up(tune: Tune) -> None:
    failed = Trial(ALPHA, 0, "FAILED", error="dir: loss is not finite")
    tune.begin(task(ALPHA), "a")
    tune.tell(failed)
    tune.clock.after(3, lambda: tune.tell(failed))  # it was tried again
    tune.clock.after(4, lambda: tune.error(task(ALPHA), "a"))
    tune.clock.after(5, tune.end)
    tune.follow()
    assert tune.endings == [(ALPHA, 0, "FAILED", "dir: loss is not finite")]


def test_a_trial_that_fails_and_then_finishes_has_not_failed(tune: Tune) -> None:
    tune.begin(task(ALPHA), "a")
    tune.tell(Trial(ALPHA, 0, "FAILED", error="a node went"))
    tune.clock.after(3, lambda: tune.tell(Trial(ALPHA, 0, "FINISHED")))
    tune.clock.after(4, lambda: tune.complete(task(ALPHA), "a"))
    tune.clock.after(5, tune.end)
    tune.follow()
    assert tune.endings == [(ALPHA, 0, "FINISHED", "")]


def test_a_trial_whose_process_is_killed_says_nothing(tune: Tune) -> None:
    tune.begin(task(ALPHA), "a")
    tune.error(task(ALPHA), "a")
    tune.clock.after(1, tune.end)
    tune.follow()
    assert tune.endings == [(ALPHA, 0, "FAILED", "its process ended without a word")]


def test_a_point_of_which_one_seed_was_finished(tune: Tune, plan: Plan) -> None:
    store(plan.run_of(Task(ALPHA, 0)), Trial(ALPHA, 0, "FINISHED", 0.5))
    tune.begin(ALPHA, "a")
    tune.tell(Trial(ALPHA, 1, "FAILED", error="no"))
    tune.error(ALPHA, "a")
    tune.clock.after(1, tune.end)
    tune.follow()
    assert tune.endings == [(ALPHA, 0, "FINISHED", ""), (ALPHA, 1, "FAILED", "no")]


def test_a_point_that_cannot_be_says_why(tune: Tune) -> None:
    tune.begin(task({"masking.ratio": 50}), "a")
    tune.error(task({"masking.ratio": 50}), "a")
    tune.clock.after(1, tune.end)
    tune.follow()
    ((_, _, status, error),) = tune.endings
    assert status == "FAILED"
    assert error.startswith("masking.ratio must lie in (0, 1), got 50")


def test_without_asha_what_left_no_result_has_failed(tune: Tune) -> None:
    tune.begin(task(ALPHA), "a")
    tune.complete(task(ALPHA), "a", **{METRIC: 0.2})
    tune.clock.after(1, tune.end)
    tune.follow()
    assert tune.endings == [(ALPHA, 0, "FAILED", "its process ended without a word")]


def test_storage_that_is_away_for_a_while_is_asked_again(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    away = [OSError("storage is away"), OSError("storage is away")]

    def read(*_: Any) -> Trial:
        if away:
            raise away.pop()
        return Trial(ALPHA, 0, "FINISHED", 0.5)

    monkeypatch.setattr(module, "result_of", read)
    monkeypatch.setattr(retry, "time", tune.clock)
    tune.begin(task(ALPHA), "a")
    tune.complete(task(ALPHA), "a")
    tune.clock.after(10, tune.end)
    tune.follow()
    assert tune.endings == [(ALPHA, 0, "FINISHED", "")]


def test_what_asha_stops_keeps_its_last_score(tune: Tune) -> None:
    tune.tuning.plan = replace(tune.tuning.plan, asha=True)
    tune.begin(task(ALPHA), "a")
    tune.complete(task(ALPHA), "a", **{METRIC: 0.2, "epoch": 3})
    tune.clock.after(1, tune.end)
    tune.follow()
    assert [(trial.status, trial.held_out) for trial in tune.over] == [("STOPPED", 0.2)]


def test_a_search_tells_of_each_point_once(tune: Tune) -> None:
    for settings, name in ((ALPHA, "a"), (OTHER, "b"), (ALPHA, "a")):  # the first one is tried again
        tune.begin(settings, name)
    tune.clock.after(1, tune.end)
    tune.follow()
    assert tune.points == [ALPHA, OTHER]


def test_stacks_of_a_trial_are_shown(tune: Tune, terminal: Terminal) -> None:
    tune.channel.exchange(["worker 0: stack"], 1)
    tune.clock.after(1, tune.end)
    tune.follow()
    assert terminal.said == ["worker 0: stack"]


def test_a_stop_waits_for_trials_that_commit_and_counts_none_as_failed(tune: Tune, terminal: Terminal) -> None:
    for settings, name in ((ALPHA, "a"), (OTHER, "b")):
        tune.begin(task(settings), name)

    def stop() -> None:
        terminal.signal = 2

    tune.clock.after(2, stop)
    tune.clock.after(4, lambda: tune.begin(task({"dir.alpha": 0.5}), "c"))  # Tune begins another, which does nothing
    tune.clock.after(5, lambda: tune.complete(task(ALPHA), "a"))
    tune.clock.after(9, lambda: tune.error(task(OTHER), "b"))
    began = tune.clock.now
    assert tune.follow() == 2
    assert 9 <= tune.clock.now - began < 9 + 2 * POLL
    assert tune.endings == []
    assert tune.channel.signal == 2  # its actors have heard


def test_a_stop_does_not_wait_for_ever(tune: Tune, terminal: Terminal) -> None:
    tune.begin(task(ALPHA), "a")
    terminal.signal = 15
    began = tune.clock.now
    assert tune.follow() == 15
    assert GRACE < tune.clock.now - began < GRACE + 5 + 2 * POLL


def test_what_tune_raises_is_raised(tune: Tune) -> None:
    tune.end()
    tune.tuning.errors = [OSError("storage is away")]
    with pytest.raises(OSError, match="storage is away"):
        tune.follow()


def test_a_search_seeks_the_highest_held_out_accuracy(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.search.optuna.OptunaSearch", lambda **given: asked.append(given))
    monkeypatch.setattr(tune.tuning, "_fit", lambda space, chooser, samples: samples)
    assert tune.tuning.search({"dir.alpha": (0.0, 5.0)}, [(ALPHA, 0.4), (OTHER, 0.6)], 3, 10) == 7
    ((given),) = asked
    assert (given["metric"], given["mode"], given["seed"]) == (METRIC, "max", tune.tuning.config.seed + 3)
    assert (given["points_to_evaluate"], given["evaluated_rewards"]) == ([ALPHA, OTHER], [0.4, 0.6])


def test_tune_keeps_what_is_highest(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which ASHA, too, tells who is behind."""
    made: list[Any] = []

    class Stopped(Exception):
        pass

    def tuner(*_: Any, **given: Any) -> Any:
        made.append(given["tune_config"])
        raise Stopped

    actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(module.ray, "remote", lambda **_: lambda kind: actor, raising=False)
    monkeypatch.setattr(module.tune, "Tuner", tuner)
    with pytest.raises(Stopped):
        tune.tuning.tasks([Task(ALPHA, 0)])
    (config,) = made
    assert (config.metric, config.mode) == (METRIC, "max")
