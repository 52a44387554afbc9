"""Between the first worker and the person's terminal: lines and progress one way, the wish to stop the other.

Its actor's process imports neither torch nor MLflow: what passes through is plain data.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from dircluster.training.ports import Status

POLL = 1.0
"""Seconds between two looks into the mailbox."""


class Mailbox:
    """What waits to be collected. Run it as an actor."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.signal = 0
        self.outcome: dict[str, Any] | None = None

    def exchange(self, events: list[Any]) -> int:
        """Worker's side: hand over events; -> the signal that asks to stop, or 0."""
        self.events += events
        return self.signal

    def collect(self, signal: int) -> tuple[list[Any], dict[str, Any] | None]:
        """Driver's side: -> events since the last call, and the outcome when there is one."""
        self.signal = signal
        events, self.events = self.events, []
        return events, self.outcome

    def finish(self, outcome: dict[str, Any]) -> None:
        """Worker's side: the run ended so."""
        self.outcome = outcome


class RemoteConsole:
    """The driver's terminal, seen from the first worker; it talks in the background."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._events: list[Any] = []
        self._signal = 0
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

    def stop_signal(self) -> int:
        return self._signal

    def finish(self, outcome: dict[str, Any]) -> None:
        """Hand over what is left, then the outcome."""
        self._closed.set()
        self._thread.join(10)
        ray.get(self._mailbox.finish.remote(outcome))

    def _talk(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(POLL)
            with self._lock:
                events, self._events = self._events, []
            self._signal = ray.get(self._mailbox.exchange.remote(events))
