"""Deliveries: in order, off the caller's thread, tried again while the receiver is down."""

from __future__ import annotations

import threading
import time

from dircluster.cluster.tracking.retry_queue import Outbox, Refused


def test_deliveries_keep_their_order_while_the_receiver_is_down() -> None:
    got: list[int] = []
    said: list[str] = []
    down = threading.Event()
    down.set()

    def deliver(number: int) -> None:
        if down.is_set():
            raise ConnectionError("refused")
        got.append(number)

    outbox = Outbox(said.append)
    began = time.monotonic()
    for number in range(50):
        outbox.put(lambda number=number: deliver(number))
    assert time.monotonic() - began < 0.4  # the caller never waits
    time.sleep(0.7)
    assert got == []
    down.clear()
    assert outbox.close(patience=20) == 0
    assert got == list(range(50))
    assert len(said) == 1
    assert "does not answer (ConnectionError)" in said[0]


def test_what_is_refused_is_said_and_does_not_block() -> None:
    got: list[int] = []
    said: list[str] = []

    def refuse() -> None:
        raise Refused("parameter changed\nsecond line")

    outbox = Outbox(said.append)
    outbox.put(refuse)
    outbox.put(lambda: got.append(1))
    assert outbox.close(patience=20) == 0
    assert (got, said) == ([1], ["MLflow refused a record: parameter changed"])


def test_patience_ends_and_the_rest_is_counted() -> None:
    def fail() -> None:
        raise ConnectionError("refused")

    outbox = Outbox(lambda line: None)
    outbox.put(fail)
    outbox.put(fail)
    assert outbox.close(patience=0.5) == 2
