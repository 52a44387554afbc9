"""The environment by which torchrun tells each of its processes which of the group it is."""

from __future__ import annotations

import os
import time

from dircluster.config import ConfigError

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def size() -> int:
    """Processes of the group; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_member() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process speaks for its group, as one without a group does."""
    return os.environ.get("RANK", "0") == "0"


TURN = 2.0
"""Seconds that a process with an error waits for the first of its machine to print its own."""


def await_turn() -> None:
    """Wait before an error is printed, in all processes of a machine but the first, which as a rule has the same one.

    torchrun ends the others once the first has failed, so that one line is printed. A process that alone has an error
    prints it after the wait.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(TURN)


def check_alone(what: str) -> None:
    """Raise ConfigError where torchrun started several of ``what`` is one process."""
    if size() > 1:
        raise ConfigError(f"{what}: leave out torchrun, or unset WORLD_SIZE {size()}")


def check_group() -> None:
    """Raise ConfigError where the environment names a process group that cannot be, as schedulers may leave behind."""
    found = {name: os.environ[name] for name in NUMBERS if name in os.environ}
    world, rank = found.get("WORLD_SIZE", "1"), found.get("RANK", "0")
    numbers = all(value.isascii() and value.isdigit() for value in found.values())
    ranked = numbers and int(rank) < int(world)
    if ranked and (here := found.get("LOCAL_WORLD_SIZE")):
        ranked = int(found.get("LOCAL_RANK", "0")) < int(here)
    missing = {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys() if ranked and int(world) > 1 else set()
    if not ranked or missing or (int(world) > 1 and not os.environ["MASTER_PORT"].isdecimal()):
        named = {name: os.environ[name] for name in (*NUMBERS, "MASTER_PORT") if name in os.environ}
        shown = ", ".join(f"{name} {value!r}" for name, value in named.items())
        lacking = f" without {' and '.join(sorted(missing))}" if missing else ""
        raise ConfigError(
            f"the environment names no group of processes: {shown}{lacking};"
            f" unset {', '.join(named)}, or start by torchrun"
        )
