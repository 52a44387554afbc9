"""What a check finds, and how checks are run: each for itself, within its seconds, whatever the others do."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dircluster.config import named_line

Status = Literal["ok", "warn", "fail", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    name: str
    status: Status
    figure: float | None = None
    """What was measured, where it is a number."""
    unit: str = ""
    bound: str = ""
    """What the figure is held against, such as ``<= 1e-05``; empty where nothing is asked of it."""
    note: str = ""
    """What else is known, or why there is no figure."""
    seconds: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """As plain data that JSON can hold: a figure that is not finite is a text."""
        figure = self.figure
        return {**asdict(self), "figure": figure if figure is None or math.isfinite(figure) else str(figure)}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Finding:
        """The finding that :meth:`to_plain` made plain."""
        figure = found["figure"]
        return cls(**{**found, "figure": figure if figure is None else float(figure)})


@dataclass(frozen=True)
class Check:
    """What is looked at together: a name, what yields its findings, and the seconds that it may take."""

    name: str
    work: Callable[[], Iterable[Finding]]
    seconds: float


class OutOfTime(BaseException):
    """A check has had its seconds. No Exception, so that nothing in a check takes it for a failure of its own."""


def at_most(
    name: str, figure: float, most: float, unit: str = "", note: str = "", otherwise: Status = "fail"
) -> Finding:
    """A figure that must not be above ``most``; one that is not a number is."""
    return Finding(name, "ok" if figure <= most else otherwise, figure, unit, f"<= {brief(most)}", note)


def largest(values: Iterable[float]) -> float:
    """The largest of them; NaN where one is, which ``max`` may pass over."""
    found = list(values)
    return next((value for value in found if math.isnan(value)), max(found))


def at_least(
    name: str, figure: float, least: float, unit: str = "", note: str = "", otherwise: Status = "fail"
) -> Finding:
    """A figure that must not be below ``least``; one that is not a number is."""
    return Finding(name, "ok" if figure >= least else otherwise, figure, unit, f">= {brief(least)}", note)


def seen(name: str, figure: float | None = None, unit: str = "", note: str = "") -> Finding:
    """A figure that is held against nothing."""
    return Finding(name, "ok", figure, unit, note=note)


def skipped(name: str, reason: str) -> Finding:
    """What was not looked at, and why."""
    return Finding(name, "skipped", note=reason)


def brief(value: float) -> str:
    """A number in the few characters that a table has for it: large ones with commas, others in three digits."""
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"


def examine(
    checks: Sequence[Check],
    seconds: float,
    tell: Callable[[Finding], None],
    stopped: Callable[[], int] = lambda: 0,
) -> list[Finding]:
    """Run ``checks`` in order within ``seconds`` altogether; ``tell`` gets each finding as it is made: -> all of them.

    A check that raises is one failed line, one that takes too long a warning, and the next one begins. Once ``stopped``
    gives a signal, no other begins.
    """
    found: list[Finding] = []
    ends = time.monotonic() + seconds

    def keep(finding: Finding) -> None:
        found.append(finding)
        tell(finding)

    for check in checks:
        if stopped():
            break
        left = ends - time.monotonic()
        if left <= 1:
            keep(skipped(check.name, f"the doctor's {seconds:.0f} s are up"))
        else:
            _run(check, min(check.seconds, left), keep)
    return found


def _run(check: Check, seconds: float, keep: Callable[[Finding], None]) -> None:
    began = time.monotonic()

    def spent() -> float:
        nonlocal began
        before, began = began, time.monotonic()
        return began - before

    try:
        with time_limit(seconds):
            for finding in check.work():
                keep(replace(finding, seconds=spent()))
    except OutOfTime:
        note = f"out of time after {seconds:.0f} s: what is missing of it was not looked at"
        keep(Finding(check.name, "warn", note=note, seconds=spent()))
    except Exception as error:  # whatever is broken here, the next check is of something else
        keep(Finding(check.name, "fail", note=named_line(error), seconds=spent()))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside after so many seconds, once Python runs again; in the main thread alone.

    Whoever had set the alarm before gets it at the time that he asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise OutOfTime

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)))
