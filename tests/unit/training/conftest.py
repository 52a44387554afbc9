"""A console that stops a run where a test wants it."""

from __future__ import annotations

from dircluster.training.protocols import Quiet, Status


class StopAfter(Quiet):
    """Asks to stop after so many progress reports."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    def show(self, status: Status) -> None:
        self.left -= 1

    def stop_signal(self) -> int:
        return 15 if self.left <= 0 else 0
