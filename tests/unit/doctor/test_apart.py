"""A check in a process of its own: its findings come over, and what kills it is one of them."""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator

import pytest

from dircluster.doctor.apart import apart
from dircluster.doctor.findings import Finding, OutOfTime, seen, skipped, time_limit
from dircluster.doctor.machine import Machine


def sound(machine: Machine, *numbers: float) -> Iterator[Finding]:
    yield seen("figures", numbers[0] + machine.rates["fp32"], "images/s", machine.config.name)
    yield seen("endless", float("inf"))
    yield skipped("nothing", "there is none")


def crashing(machine: Machine) -> Iterator[Finding]:
    yield seen("before")
    faulthandler._sigsegv()


def refusing(machine: Machine, *numbers: float) -> Iterator[Finding]:
    yield from sound(machine, *numbers)
    raise ValueError("the driver is gone")


def hanging(machine: Machine) -> Iterator[Finding]:
    yield seen("before")
    while True:
        pass


def test_a_crash_is_a_finding_that_says_where(machine: Machine) -> None:
    before, died = apart(crashing, "risky", machine)
    assert before == seen("before")
    assert (died.name, died.status) == ("risky", "fail")
    assert died.note.startswith("its process died of SIGSEGV: File ")
    assert "apart.py" in died.note  # this file's name holds it too


@pytest.mark.long
def test_findings_come_over_as_they_were_made_and_an_error_as_one(machine: Machine) -> None:
    machine.rates["fp32"] = 2.0
    *found, failed = apart(refusing, "risky", machine, 1.5)
    assert found == list(sound(machine, 1.5))
    assert (failed.status, failed.note) == ("fail", "ValueError: the driver is gone")


@pytest.mark.long
def test_one_that_hangs_ends_with_its_seconds(machine: Machine) -> None:
    found = apart(hanging, "risky", machine)
    assert next(found) == seen("before")
    with pytest.raises(OutOfTime), time_limit(0.5):
        next(found)
