"""Which process a RUNNING run belongs to. One whose process is gone without a word is closed as KILLED."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from dircluster.printing import say

OWNER_TAG, BEAT_TAG = "dircluster.owner", "dircluster.beat"
BEAT = 60.0
"""Seconds between two signs of life."""
DEAD = 900.0
"""Seconds without one after which a process that cannot be seen from here is taken to be gone."""


def this_process() -> str:
    """Where this process can be seen, its id, and when it started: none other is called so."""
    return f"{_place()} {os.getpid()} {_start(os.getpid())}"


def is_gone(owner: str, beat: str, now: float) -> bool:
    """Whether the process ``owner`` is gone, whose last sign of life was at ``beat``, seconds; empty for none."""
    place, pid, start = owner.split(" ")
    if place == _place():
        return _start(int(pid)) != start
    return beat != "" and now - float(beat) > DEAD


def close_abandoned(client: MlflowClient, experiments: list[str]) -> list[str]:
    """End as KILLED what is RUNNING without a process; -> the names of those runs.

    A process gives its signs of life with one of its runs: they are of its others too, such as those of stages.
    """
    closed, beats, now = [], dict[str, str](), time.time()
    query = f"attributes.status = 'RUNNING' AND tags.`{OWNER_TAG}` != ''"
    running = _all(partial(client.search_runs, experiments, query))
    for tags in (run.data.tags for run in running):
        beats[tags[OWNER_TAG]] = max(beats.get(tags[OWNER_TAG], ""), tags.get(BEAT_TAG, ""))
    for run in running:
        owner = run.data.tags[OWNER_TAG]
        with contextlib.suppress(ValueError):  # a tag that somebody else wrote
            if is_gone(owner, beats[owner], now):
                client.set_terminated(run.info.run_id, "KILLED")
                closed.append(_name(run))
    return closed


def _all(search: Callable[..., Any]) -> list[Any]:
    """What ``search`` finds on all of its pages, of which MLflow gives one at a time."""
    found, token = [], None
    while True:
        page = search(page_token=token)
        found += page
        token = page.token
        if not token:
            return found


@contextlib.contextmanager
def beating(uri: str, run_id: str) -> Iterator[None]:
    """Note a sign of life with a run, at once and then now and again, as far as its server answers.

    Whoever sees a record in a file sees its processes too.
    """
    if uri.startswith("sqlite"):
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        client = MlflowClient(uri)
        while True:
            with contextlib.suppress(Exception):
                client.set_tag(run_id, BEAT_TAG, f"{time.time():.0f}")
            if ended.wait(BEAT):
                return

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _place() -> str:
    """What this process can see of others: those of one boot of one machine, and of one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename}/-"


def _start(pid: int) -> str:
    """When a process started, in ticks since the boot; empty where there is none of that id, or a dead one."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else rest[18]
    except OSError:
        return ""


def _name(run: Run) -> str:
    return str(run.info.run_name or run.info.run_id)


def main(uri: str) -> int:
    """Close what is abandoned in the record at ``uri``, before somebody looks at it; -> 0."""
    from dircluster.cluster.tracking.sqlite_record import file_of, opening

    file = file_of(uri)
    if file is not None and file.exists():
        with opening(uri, str(file.resolve().parent)):
            client = MlflowClient(uri)
        for name in close_abandoned(client, [found.experiment_id for found in _all(client.search_experiments)]):
            say(f"closed as KILLED: {name}, whose process is gone")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
