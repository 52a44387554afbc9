"""Between workers and driver: lines in order, who is at work, the wish to stop, and whose outcome counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from dircluster.cluster.runtime import channel as module
from dircluster.cluster.runtime.channel import LAST_WORD, TAKEN_AWAY, RemoteConsole, WorkerChannel
from dircluster.training.protocols import Status
from tests.conftest import wait_until
from tests.unit.cluster.conftest import Actor, Clock

STATUS = Status("dir", 1, 2, 3, 8, {"loss": 0.5}, 100.0, 4.0, 2, 0.1)
BAD = {"status": "FAILED", "error": "dir: loss is not finite", "exit": 1}


class Gauge:
    """Where Prometheus would look: the newest value of each, with its tags."""

    shown: ClassVar[dict[str, tuple[float, dict[str, str]]]] = {}

    def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]) -> None:
        self.name = name

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.shown[self.name] = (value, tags)


@pytest.fixture
def channel(clock: Clock) -> WorkerChannel:
    return WorkerChannel(clock)


def test_each_event_is_collected_once_and_in_order(channel: WorkerChannel) -> None:
    channel.exchange(["a", "b"], 1)
    channel.exchange(["c"], 2)
    seen = channel.collect(0)
    assert (seen.events, seen.beats, seen.outcome) == (["a", "b", "c"], 3, None)
    assert channel.collect(0).events == []


def test_the_wish_to_stop_reaches_the_worker(channel: WorkerChannel) -> None:
    assert channel.exchange([], 1) == 0
    channel.collect(15)
    assert channel.exchange([], 1) == 15


def test_workers_come_and_go(channel: WorkerChannel) -> None:
    for rank in range(4):
        channel.enter(rank, 4, "one", rank)
    assert channel.collect(0).workers == {rank: ("one", rank) for rank in range(4)}
    channel.enter(1, 2, "two", 11)  # two of them went: ranks above are of the past
    seen = channel.collect(0)
    assert (seen.workers, seen.world, seen.beats) == ({0: ("one", 0), 1: ("two", 11)}, 2, 5)
    channel.enter(0, 2, "two", 10)
    assert channel.collect(0).workers == {0: ("two", 10), 1: ("two", 11)}


def test_the_first_worker_says_how_the_run_ended(channel: WorkerChannel, clock: Clock) -> None:
    assert not channel.fail(BAD)
    clock.sleep(LAST_WORD / 2)
    channel.finish({"status": "KILLED", "signal": 15})
    assert channel.fail(BAD)  # the other one need not wait longer
    clock.sleep(2 * LAST_WORD)
    assert channel.collect(0).outcome == {"status": "KILLED", "signal": 15}


def test_another_workers_error_counts_where_the_first_stays_silent(channel: WorkerChannel, clock: Clock) -> None:
    assert not channel.fail(BAD)
    clock.sleep(LAST_WORD / 2)
    assert not channel.fail({**BAD, "error": "a later one"})
    assert channel.collect(0).outcome is None
    clock.sleep(LAST_WORD / 2 + 0.1)
    assert channel.collect(0).outcome == BAD
    assert channel.fail(BAD)


@pytest.fixture
def console(
    channel: WorkerChannel, no_ray: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[RemoteConsole]:
    no_ray(module)
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "Gauge", Gauge)
    monkeypatch.setattr(Gauge, "shown", {})
    made = RemoteConsole(Actor(channel), "digits")
    yield made
    made._closed.set()
    made._thread.join(5)


def test_a_console_far_away_says_shows_and_hears(channel: WorkerChannel, console: RemoteConsole) -> None:
    console.say("one")
    console.show(STATUS)
    seen: list[Any] = []
    wait_until(lambda: len(seen) == 2 or seen.extend(channel.collect(15).events))
    assert seen[0] == "one"
    assert Status(**seen[1]) == STATUS
    assert Gauge.shown["dircluster_step"] == (3, {"run": "digits", "stage": "dir"})
    assert set(Gauge.shown) == set(module.GAUGES)
    wait_until(console.stop_signal)
    assert console.stop_signal() == 15


def test_a_node_that_is_taken_away_asks_to_stop_unless_the_person_does(
    channel: WorkerChannel, no_ray: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_ray(module)
    monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(module, "Gauge", Gauge)
    going: list[str] = []
    console = RemoteConsole(Actor(channel), "digits", lambda: bool(going))
    channel.collect(0)
    console.say("one")
    wait_until(lambda: channel.collect(0).events)
    assert console.stop_signal() == 0
    going.append("node1")
    wait_until(console.stop_signal)
    assert console.stop_signal() == TAKEN_AWAY
    channel.collect(15)
    wait_until(lambda: console.stop_signal() == 15)
    console.say("two")
    console.leave()
    seen = channel.collect(15)
    assert (seen.events, seen.outcome, seen.left) == (["two"], None, True)
    channel.enter(0, 1, "node2", 7)
    assert not channel.collect(15).left


def test_who_asks_whether_to_stop_shows_that_it_lives(channel: WorkerChannel, console: RemoteConsole) -> None:
    assert channel.collect(0).beats == 0
    console.stop_signal()
    wait_until(lambda: channel.collect(0).beats)


def test_the_last_lines_come_before_the_outcome(channel: WorkerChannel, console: RemoteConsole) -> None:
    for number in range(100):
        console.say(str(number))
    console.finish({"status": "FINISHED"})
    seen = channel.collect(0)
    assert seen.events == [str(number) for number in range(100)]
    assert seen.outcome == {"status": "FINISHED"}
