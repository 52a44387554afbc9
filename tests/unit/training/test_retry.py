"""Work that is tried again: for how long, how often it is complained about, in which order, and what gives up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dircluster.training import retry as module
from dircluster.training.retry import RetryQueue, retry
from tests.conftest import wait_until


class Receiver:
    """It takes items while it is open, and counts those that it was asked to take."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked, self.taken = 0, []  # type: ignore[var-annotated]

    def __call__(self, item: Any) -> None:
        self.asked += 1
        if not self.open.is_set():
            raise ConnectionError("refused\nsecond line")
        self.taken.append(item)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.02)


def queue_of(receiver: Callable[[Any], None], lines: list[str], **options: Any) -> RetryQueue[Any]:
    return RetryQueue(
        receiver,
        lines.append,
        complaint=lambda item, error: f"{item} refused: {error!r}",
        recovery=lambda item: f"{item} taken",
        **options,
    )


def failing(times: int, error: type[Exception] = OSError) -> Callable[[], int]:
    """Work that raises so many times before it succeeds; -> how often it was tried."""
    tried = 0

    def work() -> int:
        nonlocal tried
        tried += 1
        if tried <= times:
            raise error(f"try {tried}")
        return tried

    return work


def test_work_is_tried_until_it_succeeds_and_complained_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = []
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    assert retry(failing(4), complain=errors.append, longest_pause=0.1) == 5
    assert [str(error) for error in errors] == ["try 1"]
    assert pauses == [0.02, 0.04, 0.08, 0.1]


def test_patience_ends_with_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append))
    with pytest.raises(OSError, match="try 5"):
        retry(failing(1000), patience=0.2)
    assert pauses == pytest.approx([0.02, 0.04, 0.08, 0.06])
    with pytest.raises(OSError, match="try 1"):
        retry(failing(1), patience=0)


def test_final_errors_and_a_wish_to_stop_end_it_at_once() -> None:
    with pytest.raises(KeyError, match="try 1"):
        retry(failing(1, KeyError), final=(KeyError, ValueError))
    with pytest.raises(OSError, match="try 1"):
        retry(failing(1), stopped=lambda: True)


def test_work_that_is_given_up_in_a_pause_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    with pytest.raises(OSError, match="try 2"):
        retry(failing(2), stopped=lambda: len(pauses) == 2)


def test_items_keep_their_order_and_the_caller_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT", 60)
    receiver, lines = Receiver(), []  # type: ignore[var-annotated]
    queue = queue_of(receiver, lines)
    began = time.monotonic()
    for number in range(50):
        queue.put(number)
    assert time.monotonic() - began < 30
    wait_until(lambda: receiver.asked > 2)
    receiver.open.set()
    assert queue.close(patience=120) == 0
    assert receiver.taken == list(range(50))
    assert lines == ["0 refused: ConnectionError('refused\\nsecond line')", "0 taken"]
    assert queue.trouble is None


def test_patience_ends_and_the_rest_is_counted() -> None:
    receiver, lines = Receiver(), []  # type: ignore[var-annotated]
    queue = queue_of(receiver, lines)
    queue.put(1)
    queue.put(2)
    wait_until(lambda: queue.trouble)
    assert queue.close(patience=0.2) == 2
    assert isinstance(queue.trouble, ConnectionError)
    asked = receiver.asked
    time.sleep(0.5)
    assert receiver.asked <= asked + 1  # nothing is tried behind the caller's back
    assert len(lines) == 1


def test_with_merge_the_newest_takes_the_place_of_what_waits_and_of_what_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT", 60)
    receiver, lines = Receiver(), []  # type: ignore[var-annotated]
    queue = queue_of(receiver, lines, merge=lambda older, newer: [*older, *newer])
    queue.put([0])
    wait_until(lambda: receiver.asked > 0)
    began = time.monotonic()
    for number in range(1, 50):
        queue.put([number])
    assert time.monotonic() - began < 30
    wait_until(lambda: len(queue._items) == 1)  # the waiting one has joined the refused one
    receiver.open.set()
    assert queue.close(patience=120) == 0
    assert receiver.taken == [list(range(50))]
    assert lines[0].startswith("[0] refused")
    assert len(lines) == 2


def test_with_merge_a_third_item_waits_for_its_place_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    hanging, taken = threading.Event(), []  # type: ignore[var-annotated]

    def deliver(item: list[int]) -> None:
        hanging.wait(300)
        taken.append(item)

    monkeypatch.setattr(module, "LONGEST_WAIT", 0.3)
    queue = queue_of(deliver, lines, merge=lambda older, newer: [*older, *newer])
    queue.put([1])
    queue.put([2])
    began = time.monotonic()
    queue.put([3])
    assert time.monotonic() - began >= 0.3
    monkeypatch.setattr(module, "LONGEST_WAIT", 60)
    began = time.monotonic()
    queue.put([4])
    assert time.monotonic() - began < 30  # of the second wait nobody hears, and there is none
    assert lines == ["[1] refused: TimeoutError('no answer for 0 s')"]
    hanging.set()
    assert queue.close(patience=120) == 0
    assert taken == [[1], [2, 3, 4]]
    assert lines[1:] == ["[1] taken"]


def test_a_final_error_ends_the_queue_and_is_raised_to_the_caller() -> None:
    def deliver(item: int) -> None:
        raise PermissionError(f"{item} is not wanted")

    queue = queue_of(deliver, [], final=(PermissionError,))
    queue.put(1)
    wait_until(lambda: not queue._thread.is_alive())
    with pytest.raises(PermissionError, match="1 is not wanted"):
        queue.put(2)
    with pytest.raises(PermissionError, match="1 is not wanted"):
        queue.close(patience=1)
