"""Shards of an evaluation over actors, clusters that are too small, and the error of a worker beside the first."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated.gcs_pb2 import ActorTableData

from dircluster.cluster.runtime import local, nodes, ray_evaluate, ray_worker
from dircluster.cluster.runtime.channel import LAST_WORD, TAKEN_AWAY, WorkerChannel
from dircluster.config import ConfigError, ScalingConfig, error_to_plain, with_values
from dircluster.presets import preset, run_to_plain
from dircluster.training.interrupt import Interrupted
from dircluster.training.step import NonFiniteLoss
from tests.unit.cluster.conftest import Actor, Clock, Terminal


class Worker:
    """An actor that does shards one after another, in the order in which the cluster lets them end."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name, self.cluster = name, cluster

    def ready(self) -> str:
        return f"{self.name} ready"

    def work(self, index: int) -> str:
        self.cluster.done.append((self.name, index))
        return f"{self.name} {index}"


class Placed(Actor):
    """An actor whose node may be lost."""

    def _get_local_state(self) -> int:
        lost: bool = self.inside.name in self.inside.cluster.lost
        return ActorTableData.RESTARTING if lost else ActorTableData.ALIVE


class Cluster:
    """Whoever is ``lost`` has a place again once another actor has ended; ``slow`` ones never finish a shard."""

    def __init__(self, clock: Clock, places: int = 99) -> None:
        self.clock, self.places = clock, places
        self.lost: set[str] = set()
        self.slow: set[str] = set()
        self.done: list[tuple[str, int]] = []
        self.trouble: dict[str, dict[str, Any]] = {}

    def wait(self, futures: list[str], timeout: float) -> tuple[list[str], list[str]]:
        """The oldest future that has a place in the cluster."""
        self.clock.sleep(timeout)
        stuck = self.lost | self.slow
        placed = [f for f in futures if int(f.split()[0]) < self.places and f.split()[0] not in stuck]
        return placed[:1], []

    def kill(self, actor: Placed) -> None:
        self.lost.clear()

    def get(self, future: str) -> dict[str, Any] | None:
        return self.trouble.get(future)


@pytest.fixture
def cluster(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(clock)
    fake = SimpleNamespace(wait=made.wait, get=made.get, kill=made.kill, available_resources=lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray_evaluate, "ray", fake)
    monkeypatch.setattr(ray_evaluate, "time", clock)
    return made


def share_out(cluster: Cluster, terminal: Terminal, shards: int, actors: int = 3) -> tuple[int, list[int]]:
    done: list[int] = []
    workers = [Placed(Worker(str(number), cluster)) for number in range(actors)]
    signal = ray_evaluate._share_out(workers, list(range(shards)), terminal, done.append)  # type: ignore[arg-type]
    return signal, done


@pytest.mark.parametrize("shards", [1, 3, 10])
def test_every_shard_is_done_once(cluster: Cluster, terminal: Terminal, shards: int) -> None:
    signal, done = share_out(cluster, terminal, shards)
    assert (signal, sorted(done)) == (0, list(range(shards)))
    assert sorted(index for _, index in cluster.done) == list(range(shards))


def test_actors_without_a_place_are_not_waited_for(cluster: Cluster, terminal: Terminal) -> None:
    cluster.places = 1
    assert sorted(share_out(cluster, terminal, 4)[1]) == [0, 1, 2, 3]
    assert {name for name, _ in cluster.done} == {"0"}


def test_a_cluster_without_any_place_is_told_and_can_be_left(
    cluster: Cluster, terminal: Terminal, clock: Clock
) -> None:
    def stop() -> None:
        terminal.signal = 2

    cluster.places = 0
    clock.after(2.5 * ray_evaluate.PATIENCE, stop)
    assert share_out(cluster, terminal, 4) == (2, [])
    assert terminal.said == ["waiting for a place in the cluster: 2 CPUs are free"] * 2


def test_an_actor_that_lost_its_node_gets_the_place_of_one_that_has_nothing_left(
    cluster: Cluster, terminal: Terminal, clock: Clock
) -> None:
    clock.after(2.0, lambda: cluster.lost.add("1"))
    clock.after(1000.0, lambda: setattr(terminal, "signal", 2))
    signal, done = share_out(cluster, terminal, 4, actors=2)
    assert (signal, sorted(done)) == (0, [0, 1, 2, 3])
    assert terminal.said == []


def test_who_waits_for_actors_that_lost_their_nodes_is_told(cluster: Cluster, terminal: Terminal, clock: Clock) -> None:
    clock.after(1.0, lambda: cluster.lost.update("01"))
    clock.after(2.5 * ray_evaluate.PATIENCE, lambda: setattr(terminal, "signal", 2))
    assert share_out(cluster, terminal, 4, actors=2)[0] == 2
    assert terminal.said == ["waiting for a place in the cluster: 2 CPUs are free"] * 2


def test_a_long_shard_is_not_waited_for_in_words(cluster: Cluster, terminal: Terminal, clock: Clock) -> None:
    """As long as one actor works the others wait for it, whatever became of them."""
    clock.after(1.0, lambda: cluster.slow.add("0"))
    clock.after(1.0, lambda: cluster.lost.add("1"))
    clock.after(1000.0, lambda: setattr(terminal, "signal", 2))
    assert share_out(cluster, terminal, 4, actors=2)[0] == 2
    assert terminal.said == []


def test_a_shard_that_cannot_be_done_ends_the_evaluation(cluster: Cluster, terminal: Terminal) -> None:
    cluster.trouble = {"1 1": error_to_plain(ConfigError("another defense lies there now"))}
    with pytest.raises(ConfigError, match="another defense lies there now"):
        share_out(cluster, terminal, 4)


def test_a_signal_leaves_what_is_being_done(cluster: Cluster, terminal: Terminal) -> None:
    terminal.signal = 15
    assert share_out(cluster, terminal, 4) == (15, [])


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> deque[float]:
    """How many CPUs the cluster has at each look; the last one stays."""
    found: deque[float] = deque()

    def resources() -> dict[str, float]:
        return {"CPU": found.popleft() if len(found) > 1 else found[0]}

    monkeypatch.setattr(nodes, "ray", SimpleNamespace(cluster_resources=resources))
    monkeypatch.setattr(nodes, "time", clock)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many workers an autoscaler was asked to make room for."""
    found: list[int] = []
    monkeypatch.setattr(nodes, "request_resources", lambda bundles: found.append(len(bundles)))
    return found


def suffice(scaling: ScalingConfig, terminal: Terminal) -> None:
    nodes.must_suffice(scaling, terminal)  # type: ignore[arg-type]


def test_a_cluster_that_is_large_enough(sizes: deque[float], asked: list[int], terminal: Terminal) -> None:
    sizes.append(4.0)
    suffice(ScalingConfig(workers="4:8"), terminal)
    assert asked == []


def test_a_cluster_that_is_too_small_is_refused_at_once(
    sizes: deque[float], asked: list[int], terminal: Terminal, clock: Clock
) -> None:
    sizes.append(2.0)
    began = clock.now
    with pytest.raises(ConfigError, match=r"scaling\.workers 4 need as many CPUs, but the cluster has 2;"):
        suffice(ScalingConfig(workers=4), terminal)
    assert (clock.now, asked) == (began, [])


def test_who_stops_waiting_for_a_cluster_is_not_told_what_it_lacks(
    sizes: deque[float], asked: list[int], terminal: Terminal, clock: Clock
) -> None:
    sizes.append(1.0)
    clock.after(3.0, lambda: setattr(terminal, "signal", 2))
    began = clock.now
    suffice(ScalingConfig(workers=4, wait=60.0), terminal)
    assert clock.now - began == 3.0
    assert asked == [4, 0]


def test_a_cluster_that_grows_is_waited_for(
    sizes: deque[float], asked: list[int], terminal: Terminal, clock: Clock
) -> None:
    sizes.extend([1.0] * 30 + [4.0])
    began = clock.now
    suffice(ScalingConfig(workers=4, wait=60.0), terminal)
    assert 20 < clock.now - began < 40
    assert asked == [4, 0]  # what was asked for is taken back: Ray Train asks for itself


def test_a_cluster_that_does_not_grow(sizes: deque[float], asked: list[int], terminal: Terminal, clock: Clock) -> None:
    sizes.append(1.0)
    began = clock.now
    with pytest.raises(ConfigError, match="the cluster has 1"):
        suffice(ScalingConfig(workers=4, wait=60.0), terminal)
    assert clock.now - began == 60.0
    assert asked == [4, 0]  # else nodes would come, and stay, for nobody


class Second:
    """In place of a run: what rank 1 of 2 meets while it trains."""

    error: Exception = NonFiniteLoss("dir: loss is not finite at step 3")

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def execute(self) -> dict[str, Any]:
        raise self.error


@pytest.fixture
def worker(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, no_ray: Callable[..., None]
) -> Callable[[WorkerChannel], None]:
    """Run the second of two workers to its end."""
    no_ray(ray_worker, get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(ray_worker, "time", clock)
    monkeypatch.setattr(ray_worker, "Run", Second)
    second = SimpleNamespace(rank=1, world=2, first=False)
    monkeypatch.setattr(ray_worker, "local_workers", lambda *_, **__: nullcontext(second))
    config = run_to_plain(preset("digits_smoke"))
    return lambda channel: ray_worker.work(config, "owner", False, "", Actor(channel))


@pytest.mark.parametrize("launcher", [local, ray_worker])
def test_workers_wait_for_each_other_longer_than_the_first_for_storage(
    launcher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a stage: else they end by an error of their own while it still tries."""
    asked: list[float] = []

    def workers(scaling: ScalingConfig, timeout: float) -> None:
        asked.append(timeout)
        raise ConfigError("enough")

    monkeypatch.setattr(launcher, "local_workers", workers)
    run = with_values(preset("digits_smoke"), {"storage.patience": 3600.0})
    if launcher is local:
        assert local.train(run, "", False, None, Terminal())["error"] == "enough"  # type: ignore[arg-type]
    else:
        with pytest.raises(ConfigError, match="enough"):
            ray_worker.work(run_to_plain(run), "", False, "", None)
    assert asked[0] > 3600


def test_an_error_of_another_worker_becomes_the_outcome(worker: Callable[..., None], clock: Clock) -> None:
    """Where the first worker has no chance to say how the run ended: it waits in a collective."""
    channel, began = WorkerChannel(clock), clock.now
    worker(channel)
    assert clock.now - began >= 2 * LAST_WORD  # Ray would start all again as soon as one ends
    seen = channel.collect(0)
    assert seen.outcome == {"status": "FAILED", "error": "dir: loss is not finite at step 3", "exit": 1}
    assert seen.workers[1][0] == "node"


def test_another_worker_ends_once_the_first_has_spoken(worker: Callable[..., None], clock: Clock) -> None:
    channel = WorkerChannel(clock)
    clock.after(3, lambda: channel.finish({"status": "KILLED", "signal": 15}))
    began = clock.now
    worker(channel)
    assert clock.now - began <= 5
    assert channel.collect(0).outcome == {"status": "KILLED", "signal": 15}


def test_what_a_restart_may_mend_goes_to_ray(
    worker: Callable[..., None], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Second, "error", RuntimeError("Connection closed by peer"))
    channel = WorkerChannel(clock)
    with pytest.raises(RuntimeError, match="closed by peer"):
        worker(channel)
    assert channel.collect(0).outcome is None


def test_workers_return_where_a_node_is_taken_away(
    worker: Callable[..., None], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error would spend a retry; and the run has not ended."""
    monkeypatch.setattr(Second, "error", Interrupted(TAKEN_AWAY))
    channel, began = WorkerChannel(clock), clock.now
    worker(channel)
    assert clock.now == began
    assert channel.collect(0).outcome is None
