"""Protocols for progress output and experiment tracking, each with a no-op implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # whoever shows a status needs no tensors
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class Status:
    """Where a stage stands after ``step`` of ``steps``."""

    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int
    terms: Mapping[str, float]
    images_per_second: float
    eta_seconds: float
    checkpoint: int = 0
    """The newest committed step."""
    checkpoint_seconds: float = 0.0
    """What committing it took."""
    held_out: Mapping[str, float] = field(default_factory=dict)
    """The newest selection: its step, natural and robust accuracy on held-out images; empty before the first."""


class Console(Protocol):
    """Talks to the person, and hears whether the run should stop."""

    def say(self, line: str) -> None:
        """One plain line."""

    def show(self, status: Status) -> None:
        """Progress; called at every logged step."""

    def stop_signal(self) -> int:
        """Number of the signal that asked the run to stop, 0 while none did. Asking shows that the run lives."""


class StageRecord(Protocol):
    """The record of one stage."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves. What was recorded for a step stays as it was."""

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """An image (H, W, 3) of a series."""

    def unsent(self) -> tuple[list[list[Any]], dict[str, Tensor]]:
        """What was recorded and has not arrived yet, to be kept with a checkpoint: points, and pictures by name."""

    def resend(self, points: list[list[Any]], pictures: Mapping[str, Tensor]) -> None:
        """Record again what :meth:`unsent` gave before the run was interrupted."""

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED."""


class Tracker(Protocol):
    """The record of a job: one record a stage, and what comes out at the end."""

    def stage(self, name: str, key: str, facts: Mapping[str, Any]) -> StageRecord:
        """Begin the record of a stage, or continue it where one with this key exists."""

    def reused(self, name: str, key: str) -> None:
        """A stage was taken from an earlier job."""

    def results(self, rows: list[dict[str, Any]], checkpoint: Path) -> None:
        """The final table and the folder of the finished defense."""


class Quiet:
    """Says nothing, never stops."""

    def say(self, line: str) -> None: ...

    def show(self, status: Status) -> None: ...

    def stop_signal(self) -> int:
        return 0


class NoRecord:
    """Keeps no record of a stage."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None: ...

    def unsent(self) -> tuple[list[list[Any]], dict[str, Tensor]]:
        return [], {}

    def resend(self, points: list[list[Any]], pictures: Mapping[str, Tensor]) -> None: ...

    def end(self, status: str) -> None: ...


class NoTracker:
    """Keeps no record of a job."""

    def stage(self, name: str, key: str, facts: Mapping[str, Any]) -> StageRecord:
        return NoRecord()

    def reused(self, name: str, key: str) -> None: ...

    def results(self, rows: list[dict[str, Any]], checkpoint: Path) -> None: ...
