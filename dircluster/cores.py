"""How many CPU cores this process may use, which in a container or a batch job are fewer than the machine has."""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
BINDS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables by which OpenMP binds the first thread of a process to a core: what that may use says nothing then."""


def cores() -> int:
    """Those that the system lets the process run on, and no more than the quota of its control group; at least 1."""
    bound = any(os.environ.get(name) for name in BINDS)
    allowed = None if bound or not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    return max(1, int(min(allowed or os.cpu_count() or 1, quota())))


def quota() -> float:
    """Cores' worth of time that the control groups of this process leave it: infinite without a limit."""
    least = float("inf")
    for folder in _groups():
        try:
            if (folder / "cpu.max").exists():
                limit, period = (folder / "cpu.max").read_text().split()
            else:
                limit, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if limit != "max" and int(limit) > 0:
                least = min(least, int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # no limit here
            continue
    return least


def _groups() -> list[Path]:
    """Folders of the control groups of this process and of those around them, of both versions of the kernel's."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = GROUPS / controllers if controllers else GROUPS
        inner = root / path.lstrip("/")
        found += [inner, *(folder for folder in inner.parents if folder == root or root in folder.parents)]
    return found
