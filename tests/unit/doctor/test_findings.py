"""Checks run each for itself: one that raises or takes too long is a line, and the next one begins."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from dircluster.doctor.findings import Check, Finding, OutOfTime, at_least, at_most, examine, seen, skipped, time_limit


def sound() -> Iterator[Finding]:
    yield at_most("error", 1e-6, 1e-5)
    yield seen("rate", 3e12, "FLOP/s")


def broken() -> Iterator[Finding]:
    yield at_least("share", 0.5, 0.9)
    raise RuntimeError("CUDA error: an illegal memory access\nwas met")


def hanging() -> Iterator[Finding]:
    yield skipped("this", "for a reason")
    try:
        time.sleep(60)
    except Exception:
        pytest.fail("a check can catch the end of its time")
    yield seen("never")


def test_what_raises_or_hangs_is_one_line_and_the_others_go_on() -> None:
    checks = [Check("broken", broken, 9), Check("hanging", hanging, 1), Check("sound", sound, 9)]
    told: list[Finding] = []
    found = examine(checks, 30, told.append)
    assert told == found
    assert [(finding.name, finding.status) for finding in found] == [
        ("share", "fail"),
        ("broken", "fail"),
        ("this", "skipped"),
        ("hanging", "warn"),
        ("error", "ok"),
        ("rate", "ok"),
    ]
    assert found[1].note == "RuntimeError: CUDA error: an illegal memory access"
    assert found[3].note.startswith("out of time after 1 s")
    assert 0.99 < found[2].seconds + found[3].seconds < 30  # a check of a minute, on a machine however busy


def test_once_the_time_is_up_the_rest_is_skipped_with_a_reason() -> None:
    found = examine([Check("first", hanging, 60), Check("last", sound, 9)], 3, lambda finding: None)
    assert [(finding.name, finding.status) for finding in found] == [
        ("this", "skipped"),
        ("first", "warn"),
        ("last", "skipped"),
    ]
    assert "are up" in found[-1].note


def test_no_check_begins_after_a_signal() -> None:
    signals = iter([0, 15])
    found = examine([Check("first", sound, 9), Check("last", sound, 9)], 30, lambda finding: None, signals.__next__)
    assert [finding.name for finding in found] == ["error", "rate"]


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_what_is_no_number_fails_and_can_be_written(figure: float) -> None:
    finding = at_most("error", figure, 1e-5)
    assert finding.status == "fail"
    assert json.loads(json.dumps(finding.to_plain(), allow_nan=False))["figure"] == str(figure)
    assert at_least("share", float("nan"), 0.9).status == "fail"


def test_an_alarm_that_was_set_before_still_comes() -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    others = signal.setitimer(signal.ITIMER_REAL, 600)
    try:
        with pytest.raises(OutOfTime), time_limit(0.1):
            time.sleep(5)
        assert 500 < signal.getitimer(signal.ITIMER_REAL)[0] < 600
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)
