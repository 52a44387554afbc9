"""Deliveries: in order, off the caller's thread, tried again while the receiver is down."""

from __future__ import annotations

import threading
import time

from dircluster.cluster.tracking.retry_queue import Refused, RetryQueue


def test_deliveries_keep_their_order_while_the_receiver_is_down() -> None:
    got: list[int] = []
    lines: list[str] = []
    down = threading.Event()
    down.set()

    def deliver(number: int) -> None:
        if down.is_set():
            raise ConnectionError("refused")
        got.append(number)

    queue = RetryQueue(lines.append)
    began = time.monotonic()
    for number in range(50):
        queue.put(lambda number=number: deliver(number))
    assert time.monotonic() - began < 0.4  # the caller never waits
    time.sleep(0.7)
    assert got == []
    down.clear()
    assert queue.close(patience=20) == 0
    assert got == list(range(50))
    assert len(lines) == 1
    assert "does not answer (ConnectionError)" in lines[0]


def test_what_is_refused_is_said_and_does_not_block() -> None:
    got: list[int] = []
    lines: list[str] = []

    def refuse() -> None:
        raise Refused("parameter changed\nsecond line")

    queue = RetryQueue(lines.append)
    queue.put(refuse)
    queue.put(lambda: got.append(1))
    assert queue.close(patience=20) == 0
    assert (got, lines) == ([1], ["MLflow refused a record: parameter changed"])


def test_patience_ends_and_the_rest_is_counted() -> None:
    def fail() -> None:
        raise ConnectionError("refused")

    queue = RetryQueue(lambda line: None)
    queue.put(fail)
    queue.put(fail)
    assert queue.close(patience=0.5) == 2
