"""Work that is tried again while what receives it refuses: by a caller who waits, or in order behind the caller."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

FIRST_PAUSE = 0.5
"""Seconds between the first two tries; each pause after that is twice as long."""
LONGEST_PAUSE = 5.0
LONGEST_WAIT = 5.0
"""Seconds that a caller waits for a place in a queue that merges, before its items are merged."""

Result = TypeVar("Result")
Item = TypeVar("Item")
Errors = tuple[type[Exception], ...]


def retry(
    work: Callable[[], Result],
    *,
    complain: Callable[[Exception], None] = lambda error: None,
    patience: float = math.inf,
    longest_pause: float = LONGEST_PAUSE,
    final: Errors = (),
    stopped: Callable[[], bool] = lambda: False,
) -> Result:
    """The result of ``work``, tried until it raises nothing; ``complain`` gets the first error.

    Raises what ``work`` raises where that is ``final``, after ``patience`` seconds, or once ``stopped``.
    """
    deadline, pause, complained = time.monotonic() + patience, FIRST_PAUSE, False
    while True:
        try:
            return work()
        except final:
            raise
        except Exception as error:  # whatever storage or a network says: it may say otherwise later
            left = deadline - time.monotonic()
            if left <= 0 or stopped():
                raise
            if not complained:
                complain(error)
            complained, refused = True, error
        time.sleep(min(pause, left))
        if stopped():  # whoever gave it up may have let go of what it would write to
            raise refused
        pause = min(2 * pause, longest_pause)


class RetryQueue(Generic[Item]):
    """A thread that delivers items one after another, each tried again until it is accepted.

    With ``merge`` one item waits behind the one under way, and a third is waited for. Where the receiver refuses or
    stalls, nobody waits: ``merge(older, newer)`` takes the place of both, also of the item that is refused.
    """

    def __init__(
        self,
        deliver: Callable[[Item], None],
        say: Callable[[str], None],
        *,
        complaint: Callable[[Item, Exception], str],
        recovery: Callable[[Item], str],
        merge: Callable[[Item, Item], Item] | None = None,
        final: Errors = (),
        longest_pause: float = LONGEST_PAUSE,
    ) -> None:
        """``say`` gets one ``complaint`` in each time of trouble, and one ``recovery`` after it."""
        self._deliver, self._say, self._complaint, self._recovery = deliver, say, complaint, recovery
        self._merge, self._final, self._longest_pause = merge, final, longest_pause
        self.trouble: Exception | None = None
        """Why the receiver accepts nothing."""
        self._items: deque[Item] = deque()
        """In order; only the thread touches the first one."""
        self._closing = self._abandoned = False
        self._ended: Exception | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="retry-queue", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Deliver ``item`` after everything put before. Raises the final error that ended the queue."""
        with self._changed:
            if self._merge is not None and not self._changed.wait_for(self._takes_more, LONGEST_WAIT):
                self._complain(TimeoutError(f"no answer for {LONGEST_WAIT:.0f} s"))
            if self._ended is not None:
                raise self._ended
            if self._merge is not None and len(self._items) > 1:
                self._items[-1] = self._merge(self._items[-1], item)
            else:
                self._items.append(item)
            self._changed.notify_all()

    def close(self, patience: float) -> int:
        """Wait up to ``patience`` seconds until all is delivered; -> how many items were given up.

        Raises the final error that ended the queue.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)
        self._abandoned = True
        if self._ended is not None:
            raise self._ended
        return len(self._items)

    def _takes_more(self) -> bool:
        return len(self._items) < 2 or self.trouble is not None or self._ended is not None

    def _complain(self, trouble: Exception) -> None:
        if self.trouble is None:
            self._say(self._complaint(self._items[0], trouble))
        self.trouble = trouble

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._closing)
                if not self._items:
                    return
            try:
                retry(
                    self._try_first,
                    longest_pause=self._longest_pause,
                    final=self._final,
                    stopped=lambda: self._abandoned,
                )
            except Exception as error:
                with self._changed:
                    self._ended = error if isinstance(error, self._final) else None
                    self._changed.notify_all()
                return

    def _try_first(self) -> None:
        with self._changed:
            if self._merge is not None and self.trouble is not None and len(self._items) > 1:
                refused = self._items.popleft()
                self._items[0] = self._merge(refused, self._items[0])
            item = self._items[0]
        try:
            self._deliver(item)
        except self._final:
            raise
        except Exception as error:
            with self._changed:
                if not self._abandoned:
                    self._complain(error)
                self._changed.notify_all()
            raise
        with self._changed:
            if self.trouble is not None:
                self._say(self._recovery(item))
            self.trouble = None
            self._items.popleft()
            self._changed.notify_all()
