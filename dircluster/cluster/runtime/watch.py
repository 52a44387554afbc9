"""What the driver concludes from what it sees of a run: it goes on, has ended, waits for workers, or hangs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dircluster.cluster.runtime.stack_dump import GONE
from dircluster.config import ScalingConfig

if TYPE_CHECKING:
    from dircluster.cluster.runtime.channel import Seen

Workers = dict[int, tuple[str, int]]
"""Node and process of each worker, by its rank."""
GRACE = 25.0
"""Seconds that workers have to commit a checkpoint after a signal, before they are ended."""
SILENCE = 60.0
"""Seconds without a worker after which the person is shown what is waited for."""
WAITS = "waiting for"
"""How the line begins that says what is waited for."""


class Follower(Protocol):
    """Whom a run is shown to while it lasts."""

    def say(self, line: str) -> None: ...

    def tell(self, event: str | dict[str, Any]) -> None:
        """What a worker said, or showed as a Status."""

    def stop_signal(self) -> int: ...


class Watch:
    """One run, look after look. It knows the cluster only through the functions it is given."""

    def __init__(
        self,
        scaling: ScalingConfig,
        terminal: Follower,
        dump: Callable[[Workers], dict[int, str]],
        end: Callable[[Workers], None],
        free_cpus: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        patient: bool = False,
    ) -> None:
        """``dump`` gives the stack of every worker, or GONE; ``end`` kills the workers of a run that is given up.

        ``patient``: workers are waited for as long as it takes.
        """
        self.scaling, self.terminal, self.patient = scaling, terminal, patient
        self.dump, self.end, self.free_cpus, self.clock = dump, end, free_cpus, clock
        self.beats, self.lived = 0, clock()
        self.came: Workers = {}
        self.asked = 0.0
        """When the workers were first asked to stop, 0 while they were not."""
        self.gone = 0.0
        """Since when workers are missing, 0 while none is known to be."""

    def look(self, seen: Seen, alive: bool, errors: Sequence[BaseException]) -> dict[str, Any] | None:
        """The outcome of the run, or None while it goes on.

        ``alive``: Ray Train still works on it; ``errors``: what it raised.
        """
        for event in seen.events:
            self.terminal.tell(event)
        if seen.outcome is not None:
            return dict(seen.outcome)
        if not alive:
            self.terminal.say("".join(traceback.format_exception(errors[0])) if errors else "no worker said why")
            return {"status": "FAILED", "error": "Ray Train gave up; the reason stands above", "exit": 1}
        if signal := self.terminal.stop_signal():
            self.asked = self.asked or self.clock()
            return {"status": "KILLED", "signal": signal} if self.clock() - self.asked > GRACE else None
        return self._stalled(seen)

    def _stalled(self, seen: Seen) -> dict[str, Any] | None:
        """The outcome of a run that shows no life although all its workers exist; None otherwise."""
        now = self.clock()
        if seen.workers != self.came and len(seen.workers) == seen.world:
            if self.came:
                self.terminal.say(f"workers changed: {seen.world} at work")
            self.came = dict(seen.workers)
        if seen.beats != self.beats or seen.events:
            self.beats, self.lived, self.gone = seen.beats, now, 0.0
        patience = min(SILENCE, self.scaling.stall) if self.gone or not self.came else self.scaling.stall
        if now - self.lived < patience:
            return None
        dumps = self.dump(self.came) if self.came and not self.gone else {}
        if not dumps or GONE in dumps.values():  # Ray starts the workers again as soon as it can
            self.lived, self.gone = now, self.gone or now
            free = f"{self.free_cpus():g} CPUs of the cluster are free"
            self.terminal.say(f"waiting for {self.scaling.least} workers: {free}")
            if self.patient or now - self.gone < self.scaling.stall + self.scaling.wait:
                return None
            error = f"no {self.scaling.least} workers for {now - self.gone:.0f} s (scaling.stall, scaling.wait)"
            return {"status": "FAILED", "error": f"{error}; the same command resumes", "exit": 1}
        for rank, dump in sorted(dumps.items()):
            self.terminal.say(f"worker {rank}: {dump}")
        self.end(self.came)
        return {
            "status": "FAILED",
            "error": f"no worker made progress for {self.scaling.stall:.0f} s (scaling.stall);"
            " their stacks stand above, and the same command resumes from the last checkpoint",
            "exit": 1,
        }
