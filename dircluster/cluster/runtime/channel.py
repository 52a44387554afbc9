"""Between the workers and the person's terminal: lines and progress one way, the wish to stop the other.

Its actor's process imports neither torch nor MLflow: what passes through is plain data.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.metrics import Gauge

if TYPE_CHECKING:
    from dircluster.training.protocols import Status

POLL = 1.0
"""Seconds between two looks into the channel."""
LAST_WORD = 15.0
"""Seconds that the first worker has to say how a run ended after another one has failed."""
TAKEN_AWAY = 1000
"""What asks a run to stop whose node is about to be taken away; no signal has this number."""
GAUGES = {
    "dircluster_step": "Steps done of the stage",
    "dircluster_images_per_second": "Training images a second over all workers",
    "dircluster_loss": "Loss of the newest logged step",
    "dircluster_checkpoint_step": "Newest step whose checkpoint is committed",
    "dircluster_checkpoint_seconds": "Seconds that committing it took",
}
"""What Prometheus is shown of a run, tagged with run and stage; Ray prefixes the names with ray_."""


@dataclass
class Seen:
    """What the driver collects at a look."""

    events: list[Any]
    outcome: dict[str, Any] | None
    beats: int
    """Signs of life so far: steps, evaluation passes, workers that came."""
    workers: dict[int, tuple[str, int]]
    """Node and process of each worker, by its rank."""
    world: int
    """How many workers there are to be."""
    left: bool = False
    """Whether the workers have left a node that is about to be taken away, and none has come since."""


class WorkerChannel:
    """What waits to be collected. Run it as an actor."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.events: list[Any] = []
        self.signal = 0
        self.beats = self.world = 0
        self.workers: dict[int, tuple[str, int]] = {}
        self.record: tuple[dict[str, Any] | None] | None = None
        self.outcome: dict[str, Any] | None = None
        self.left = False
        self.failed: tuple[float, dict[str, Any]] | None = None

    def enter(self, rank: int, world: int, node: str, process: int) -> None:
        """Worker's side: this process is ``rank`` of ``world`` from now on."""
        self.world, self.left = world, False
        self.workers = {r: where for r, where in self.workers.items() if r < world} | {rank: (node, process)}
        self.beats += 1

    def open(self, record: dict[str, Any] | None) -> None:
        """Driver's side: this is the run in MLflow, or there is none; work may begin."""
        self.record = (record,)

    def opened(self) -> tuple[dict[str, Any] | None] | None:
        """Worker's side: what :meth:`open` was given, None until then."""
        return self.record

    def exchange(self, events: list[Any], beats: int) -> int:
        """First worker's side: hand over events and signs of life; -> the signal that asks to stop, or 0."""
        self.events += events
        self.beats += beats
        return self.signal

    def collect(self, signal: int) -> Seen:
        """Driver's side: what has come since the last call."""
        self.signal = signal
        events, self.events = self.events, []
        if self.outcome is None and self.failed is not None and self.clock() - self.failed[0] > LAST_WORD:
            self.outcome = self.failed[1]
        return Seen(events, self.outcome, self.beats, self.workers, self.world, self.left)

    def leave(self) -> None:
        """First worker's side: the workers have committed, and leave a node that is about to be taken away."""
        self.left = True

    def finish(self, outcome: dict[str, Any]) -> None:
        """First worker's side: the run ended so."""
        self.outcome = outcome

    def fail(self, outcome: dict[str, Any]) -> bool:
        """Another worker's side: it failed so, should the first one not say how the run ended; -> whether it did."""
        self.failed = self.failed or (self.clock(), outcome)
        return self.outcome is not None


class RemoteConsole:
    """The driver's terminal, seen from the first worker; it talks in the background.

    ``leaves`` says whether a node of the run is about to be taken away, which asks to stop as a signal does.
    """

    def __init__(self, channel: Any, run: str, leaves: Callable[[], bool] = lambda: False) -> None:
        self._leaves = leaves
        self._channel = channel
        self._events: list[Any] = []
        self._signal = self._beats = 0
        self._gauges = {name: Gauge(name, text, tag_keys=("run", "stage")) for name, text in GAUGES.items()}
        self._run = run
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="console", daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        with self._lock:
            self._events.append(line)

    def show(self, status: Status) -> None:
        with self._lock:
            self._events.append(asdict(status))
        shown = (
            status.step,
            status.images_per_second,
            status.terms["loss"],
            status.checkpoint,
            status.checkpoint_seconds,
        )
        for gauge, value in zip(self._gauges.values(), shown, strict=True):
            gauge.set(value, {"run": self._run, "stage": status.stage})

    def stop_signal(self) -> int:
        self._beats += 1  # who asks is alive
        return self._signal

    def finish(self, outcome: dict[str, Any]) -> None:
        """Hand over what is left, then the outcome."""
        self._close()
        ray.get(self._channel.finish.remote(outcome))

    def leave(self) -> None:
        """Hand over what is left, and say that the workers leave."""
        self._close()
        ray.get(self._channel.leave.remote())

    def _close(self) -> None:
        self._closed.set()
        self._thread.join(10)

    def _talk(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(POLL)
            with self._lock:
                events, self._events = self._events, []
            beats, self._beats = self._beats, 0
            self._signal = ray.get(self._channel.exchange.remote(events, beats)) or TAKEN_AWAY * self._leaves()
