"""Deliveries off the training thread: in order, retried for as long as the receiver is down, never lost silently."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable


class RetryQueue:
    """A thread that carries out deliveries one after another; one that fails is tried again until it succeeds.

    A delivery raises :class:`Refused` where trying again is useless; it is then dropped with a warning.
    """

    LONGEST_PAUSE = 10.0
    """Seconds between two tries at the most."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._warn = warn
        self._wake = threading.Condition()
        self._closing = self._abandoned = False
        self._thread = threading.Thread(target=self._deliver, name="retry-queue", daemon=True)
        self._thread.start()

    def put(self, delivery: Callable[[], None]) -> None:
        """Deliver after everything put before; returns at once."""
        with self._wake:
            self._waiting.append(delivery)
            self._wake.notify()

    def close(self, patience: float) -> int:
        """Wait up to ``patience`` seconds until all is delivered; -> how many deliveries were given up."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(patience)
        self._abandoned = True
        return len(self._waiting)

    def _deliver(self) -> None:
        pause = 0.5
        while True:
            with self._wake:
                while not self._waiting:
                    if self._closing:
                        return
                    self._wake.wait()
                delivery = self._waiting[0]
            try:
                delivery()
            except Refused as refusal:
                self._warn(f"MLflow refused a record: {str(refusal).splitlines()[0]}")
            except Exception as error:  # whatever the network throws; the delivery stays first in line
                if self._abandoned:
                    return
                if pause == 0.5:
                    self._warn(f"MLflow does not answer ({type(error).__name__}); keeping records until it does")
                time.sleep(pause)
                pause = min(2 * pause, self.LONGEST_PAUSE)
                continue
            pause = 0.5
            with self._wake:
                self._waiting.popleft()


class Refused(Exception):
    """The receiver answered, and will never accept this delivery."""
