"""Checkpoints on their way to storage, off the training thread: in order, tried again while storage refuses them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dircluster.training.checkpoint import CheckpointError, Checkpoints
from dircluster.training.locks import TakenOverError


@dataclass(frozen=True)
class Save:
    """The state after ``step`` steps, copied to this machine's memory, and new best weights where there are any."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    best: tuple[str, Mapping[str, Tensor], Mapping[str, Any]] | None = None
    """Name of their folder, weights, and what is known of them."""


class CheckpointWriter:
    """A thread that commits one save while the next one waits; a third is waited for.

    Where storage refuses or stalls, training goes on: the newest save takes the place of the one that waits.
    """

    LONGEST_PAUSE = 5.0
    """Seconds between two tries at the most."""
    LONGEST_WAIT = 5.0
    """Seconds that training waits for a commit under way before it goes on without."""

    def __init__(self, checkpoints: Checkpoints, warn: Callable[[str], None]) -> None:
        self.checkpoints, self.warn = checkpoints, warn
        self.step, self.seconds = 0, 0.0
        """The newest committed step, and what committing it took."""
        self._waiting: Save | None = None
        self._closing = self._abandoned = False
        self._ended: TakenOverError | None = None
        self._trouble = ""
        """Why storage takes nothing, empty while it does."""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def put(self, save: Save) -> None:
        """Commit ``save`` soon. Raises TakenOverError once another job holds the folder."""
        with self._changed:
            if self._ended is not None:
                raise self._ended
            free = self._changed.wait_for(lambda: self._waiting is None or self._trouble, self.LONGEST_WAIT)
            if not free:
                self._complain(self._waiting, f"no answer for {self.LONGEST_WAIT:.0f} s")
            if self._waiting is not None and save.best is None:
                save = replace(save, best=self._waiting.best)
            self._waiting = save
            self._changed.notify_all()

    def close(self, patience: float) -> None:
        """Wait up to ``patience`` seconds until all is committed. Raises CheckpointError where it is not."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)
        self._abandoned = True
        if self._ended is not None:
            raise self._ended
        if self._thread.is_alive():
            raise CheckpointError(
                f"storage.uri: {self.checkpoints.folder} took no checkpoint for {patience:.0f} s"
                f" ({self._trouble or 'no answer'}); what was committed before stays"
            )

    def _complain(self, save: Save | None, trouble: str) -> None:
        if not self._trouble and save is not None:
            self.warn(f"checkpoint {save.step} cannot be stored ({trouble}); training goes on, and it is tried again")
        self._trouble = trouble

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None:
                    if self._closing:
                        return
                    self._changed.wait()
                save, self._waiting = self._waiting, None
                self._changed.notify_all()
            self._commit(save)
            if self._ended is not None:
                return

    def _commit(self, save: Save) -> None:
        pause, began = 0.5, time.monotonic()
        while not self._abandoned:
            try:
                if save.best is not None:
                    name, weights, facts = save.best
                    self.checkpoints.save_at(name, {"model": weights}, {"best": facts})
                self.checkpoints.save(save.step, save.tensors, save.state)
            except TakenOverError as error:
                self._ended = error
                return
            except Exception as trouble:  # whatever storage says: it may say otherwise later
                with self._changed:
                    self._complain(save, _line(trouble))
                    self._changed.notify_all()
                time.sleep(pause)
                pause = min(2 * pause, self.LONGEST_PAUSE)
                with self._changed:
                    if self._waiting is not None:  # a newer one has come meanwhile
                        newer, self._waiting = self._waiting, None
                        save = newer if newer.best is not None else replace(newer, best=save.best)
                continue
            with self._changed:
                if self._trouble:
                    self.warn(f"checkpoint {save.step} is stored: storage takes checkpoints again")
                self.step, self.seconds, self._trouble = save.step, time.monotonic() - began, ""
                self._changed.notify_all()
            return


def _line(trouble: Exception) -> str:
    return (str(trouble).strip() or type(trouble).__name__).splitlines()[0]
