"""What the driver concludes from its looks: workers that come and go, hang, end, fail, or are asked to stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dircluster.cluster.runtime.channel import POLL, Seen
from dircluster.cluster.runtime.stack_dump import GONE
from dircluster.cluster.runtime.watch import GRACE, SILENCE, WAITS, Watch
from dircluster.config import ScalingConfig
from tests.unit.cluster.conftest import Clock, Terminal

TWO = {0: ("node one", 11), 1: ("node two", 12)}
SCALING = ScalingConfig(workers="1:2", stall=100.0, wait=50.0)


class Cluster:
    """What a watch sees of a run: change it, then look."""

    def __init__(self, clock: Clock, terminal: Terminal, scaling: ScalingConfig = SCALING) -> None:
        self.clock = clock
        self.stacks: dict[int, str] = {0: "in backward", 1: "in all_reduce"}
        self.ended: list[Any] = []
        self.seen = Seen([], None, 0, {}, 0)
        self.alive, self.errors = True, list[BaseException]()
        self.watch = Watch(scaling, terminal, lambda _: self.stacks, self.ended.append, lambda: 3.0, clock)

    def look(self, **changed: Any) -> dict[str, Any] | None:
        self.seen = replace(self.seen, **changed)
        found = self.watch.look(self.seen, self.alive, self.errors)
        self.seen = replace(self.seen, events=[])
        return found

    def look_for(self, seconds: float, living: bool = False) -> dict[str, Any] | None:
        """Look once a second, until there is an outcome."""
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.clock.sleep(POLL)
            if (outcome := self.look(**({"beats": self.seen.beats + 1} if living else {}))) is not None:
                return outcome
        return None


@pytest.fixture
def cluster(clock: Clock, terminal: Terminal) -> Cluster:
    return Cluster(clock, terminal)


def test_a_run_that_shows_life_goes_on(cluster: Cluster, terminal: Terminal) -> None:
    assert cluster.look(workers=TWO, world=2, beats=2) is None
    assert cluster.look_for(10 * SCALING.stall, living=True) is None
    assert (terminal.said, cluster.ended) == ([], [])


def test_a_line_is_a_sign_of_life(cluster: Cluster) -> None:
    cluster.look(workers=TWO, world=2, beats=2)
    for number in range(5):
        assert cluster.look_for(SCALING.stall - 5) is None
        assert cluster.look(events=[f"line {number}"]) is None


def test_events_reach_the_terminal_before_the_outcome(cluster: Cluster, terminal: Terminal) -> None:
    outcome = {"status": "FINISHED", "checkpoint": "final"}
    assert cluster.look(events=["one", {"stage": "dir"}], outcome=outcome) == outcome
    assert terminal.told == ["one", {"stage": "dir"}]


def test_workers_that_hang_are_shown_and_ended(cluster: Cluster, terminal: Terminal) -> None:
    cluster.look(workers=TWO, world=2, beats=2)
    assert cluster.look_for(SCALING.stall - 1) is None
    outcome = cluster.look_for(1)
    assert outcome is not None
    assert (outcome["status"], outcome["exit"]) == ("FAILED", 1)
    assert "no worker made progress for 100 s (scaling.stall)" in outcome["error"]
    assert terminal.said == ["worker 0: in backward", "worker 1: in all_reduce"]
    assert cluster.ended == [TWO]


def test_a_worker_that_is_gone_is_waited_for(cluster: Cluster, terminal: Terminal) -> None:
    """Its process does not exist: Ray will start it again, nothing is ended."""
    cluster.look(workers=TWO, world=2, beats=2)
    cluster.stacks = {0: "in all_reduce", 1: GONE}
    assert cluster.look_for(SCALING.stall) is None
    assert terminal.said == ["waiting for 1 workers: 3 CPUs of the cluster are free"]
    again = {0: ("node one", 21), 1: ("node two", 22)}
    assert cluster.look(workers=again, beats=4) is None
    assert terminal.said[1:] == ["workers changed: 2 at work"]
    cluster.stacks = {0: "hangs", 1: "hangs"}
    assert cluster.look_for(SCALING.stall - 1) is None  # full patience with those that came
    assert cluster.look_for(1) is not None
    assert cluster.ended == [again]


def test_workers_that_never_come_back_end_the_run(cluster: Cluster, terminal: Terminal) -> None:
    cluster.look(workers=TWO, world=2, beats=2)
    cluster.stacks = {0: GONE, 1: GONE}
    began = cluster.clock.now
    outcome = cluster.look_for(1000)
    assert outcome is not None
    assert "no 1 workers for" in outcome["error"]
    waited = cluster.clock.now - began - SCALING.stall
    assert SCALING.stall + SCALING.wait <= waited < SCALING.stall + SCALING.wait + SILENCE
    assert len(terminal.said) == 1 + waited // SILENCE
    assert cluster.ended == []


def test_workers_that_never_came(cluster: Cluster, terminal: Terminal) -> None:
    assert cluster.look_for(SILENCE - 1) is None
    assert terminal.said == []
    assert cluster.look_for(1) is None
    assert terminal.said == ["waiting for 1 workers: 3 CPUs of the cluster are free"]
    outcome = cluster.look_for(1000)
    assert outcome is not None
    assert outcome["error"].startswith("no 1 workers for")


def test_a_patient_run_waits_for_workers_as_long_as_it_takes(cluster: Cluster, terminal: Terminal) -> None:
    cluster.watch.patient = True
    assert cluster.look_for(20 * (SCALING.stall + SCALING.wait)) is None
    assert set(terminal.said) == {"waiting for 1 workers: 3 CPUs of the cluster are free"}
    assert terminal.said[0].startswith(WAITS)  # by which a trial knows it
    cluster.look(workers=TWO, world=2, beats=2)
    assert cluster.look_for(SCALING.stall) is not None  # those that hang are ended as ever


def test_a_short_stall_shortens_the_silence_too(clock: Clock, terminal: Terminal) -> None:
    cluster = Cluster(clock, terminal, replace(SCALING, stall=15.0))
    assert cluster.look_for(15) is None
    assert len(terminal.said) == 1


def test_fewer_and_more_workers_are_told_once_they_are_complete(cluster: Cluster, terminal: Terminal) -> None:
    cluster.look(workers=TWO, world=2, beats=2)
    cluster.look(workers={0: ("node one", 31)}, world=2, beats=3)  # the other is on its way
    assert terminal.said == []
    cluster.look(workers={0: ("node one", 31)}, world=1, beats=4)
    assert terminal.said == ["workers changed: 1 at work"]
    cluster.look(workers=TWO, world=2, beats=6)
    cluster.look(beats=7)
    assert terminal.said == ["workers changed: 1 at work", "workers changed: 2 at work"]


def test_what_ray_train_gives_up_is_told_with_its_traceback(cluster: Cluster, terminal: Terminal) -> None:
    cluster.alive = False
    outcome = cluster.look()
    assert outcome == {"status": "FAILED", "error": "Ray Train gave up; the reason stands above", "exit": 1}
    assert terminal.said == ["no worker said why"]
    cluster.errors = [RuntimeError("worker 1 died")]
    cluster.look()
    assert terminal.said[-1].endswith("RuntimeError: worker 1 died\n")


def test_an_outcome_counts_although_ray_train_has_ended(cluster: Cluster) -> None:
    cluster.alive = False
    assert cluster.look(outcome={"status": "KILLED", "signal": 15}) == {"status": "KILLED", "signal": 15}


def test_workers_that_are_asked_to_stop_have_some_time(cluster: Cluster, terminal: Terminal) -> None:
    cluster.look(workers=TWO, world=2, beats=2)
    terminal.signal = 2
    assert cluster.look_for(GRACE) is None
    assert cluster.look_for(2 * POLL) == {"status": "KILLED", "signal": 2}
    assert cluster.ended == []


def test_who_stops_hears_of_no_stall(cluster: Cluster, terminal: Terminal) -> None:
    cluster.look(workers=TWO, world=2, beats=2)
    cluster.look_for(SCALING.stall - 5)
    terminal.signal = 15
    assert cluster.look_for(GRACE - 1) is None
    assert terminal.said == []
    assert cluster.look(outcome={"status": "KILLED", "signal": 15}) == {"status": "KILLED", "signal": 15}
