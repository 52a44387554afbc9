"""Checkpoints on their way to storage, off the training thread: in order, tried again while storage refuses them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dircluster.config import StoppedError, first_line
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.locks import TakenOverError
from dircluster.training.retry import RetryQueue

GOES_ON = "training goes on, and it is tried again"


@dataclass(frozen=True)
class Save:
    """The state after ``step`` steps, copied to this machine's memory, and new best weights where there are any."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    best: tuple[str, Mapping[str, Tensor], Mapping[str, Any]] | None = None
    """Name of their folder, weights, and what is known of them."""


class CheckpointWriter:
    """Commits one save while the next one waits; a third is waited for.

    Where storage refuses or stalls, training goes on: the newest save takes the place of the one that waits.
    """

    def __init__(self, checkpoints: Checkpoints, warn: Callable[[str], None]) -> None:
        self.checkpoints = checkpoints
        self.step, self.seconds = 0, 0.0
        """The newest committed step, and what committing it took."""
        self._queue: RetryQueue[Save] = RetryQueue(
            self._commit,
            warn,
            complaint=lambda save, error: f"checkpoint {save.step} cannot be stored ({first_line(error)}); {GOES_ON}",
            recovery=lambda save: f"checkpoint {save.step} is stored: storage takes checkpoints again",
            merge=lambda older, newer: newer if newer.best is not None else replace(newer, best=older.best),
            final=(TakenOverError,),
        )

    def put(self, save: Save) -> None:
        """Commit ``save`` soon. Raises TakenOverError once another job holds the folder."""
        self._queue.put(save)

    def close(self, patience: float) -> None:
        """Wait up to ``patience`` seconds until all is committed. Raises StoppedError where it is not."""
        if self._queue.close(patience):
            trouble = self._queue.trouble
            raise StoppedError(
                f"storage.uri: {self.checkpoints.folder} took no checkpoint for {patience:.0f} s"
                f" ({first_line(trouble) if trouble else 'no answer'}); what was committed before stays"
            )

    def _commit(self, save: Save) -> None:
        began = time.monotonic()
        if save.best is not None:
            name, weights, facts = save.best
            self.checkpoints.save_at(name, {"model": weights}, {"best": facts})
        self.checkpoints.save(save.step, save.tensors, save.state)
        self.step, self.seconds = save.step, time.monotonic() - began
