"""All checks in order, each with its seconds."""

from __future__ import annotations

from functools import partial

from dircluster.doctor import devices, numerics, rates, runs, speed
from dircluster.doctor.apart import Work, apart
from dircluster.doctor.findings import Check
from dircluster.doctor.machine import Machine

ON_CPU, ON_GPU = 60.0, 180.0
"""Seconds that all of it may take."""


def checks(machine: Machine, commit: str, seconds: float | None = None) -> list[Check]:
    """What is looked at, what decides most first; each may take its share of ``seconds``, or of what is usual."""
    usual = ON_GPU if machine.gpu else ON_CPU
    made = []

    def add(name: str, work: Work, on_cpu: float, on_gpu: float, timed: bool = False, risky: bool = False) -> None:
        own = (on_gpu if machine.gpu else on_cpu) * (seconds or usual) / usual
        if risky and machine.gpu:  # what crashes there ends a process of its own
            work = partial(apart, work, name)
        made.append(Check(name, partial(work, machine, *((own,) if timed else ())), own))

    add("versions", partial(rates.versions, commit=commit), 5, 15)
    add("room", rates.room, 2, 5)
    add("rates", rates.rates, 8, 20)
    add("attention", numerics.attention, 8, 20)
    add("agreement with the CPU", numerics.agreement, 10, 20)
    add("draws", numerics.draws, 5, 10)
    add("predictions", numerics.predictions, 10, 25)
    add("kill and resume", runs.resumed, 20, 40)
    add("kinds of steps", runs.steps, 8, 70, risky=True)
    add("speed of the stages", speed.stages, 15, 50, timed=True, risky=True)
    add("EOT", speed.expectation, 6, 10)
    add("kernels", speed.kernels, 8, 25, risky=True)
    add("several devices", devices.several, 20, 60, timed=True)
    return made
