"""One job trains a stage at a time: a file lock in a folder, a lease with a heartbeat in object storage."""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dircluster.config import ConfigError

BEAT = 3.0
"""Seconds between two heartbeats of a lease."""
DEAD = 15.0
"""Seconds without one after which its job is taken to be gone."""
SETTLE = 0.5
"""Seconds between writing a lease and looking whether it stands."""


class TakenOverError(ConfigError):
    """Another job holds what this one wants to write."""


@contextlib.contextmanager
def stage_lock(folder: Path, owner: str, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold ``folder`` for the job ``owner``; yields a check that raises TakenOverError where it no longer does.

    Raises TakenOverError where another job holds it, ConfigError where it cannot be locked. A file lock ends with its
    process; a lease outlives it by ``DEAD`` seconds, but a job whose worker was restarted takes its own up again at
    once.
    """
    with _lock(folder) if isinstance(folder, Path) else _lease(folder, owner, say) as check:
        yield check


def _busy(folder: Path) -> TakenOverError:
    return TakenOverError(f"another job is training {folder}; wait for it, or use --fresh")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[Callable[[], None]]:
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / "lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _busy(folder) from error
        except OSError as error:  # some network file systems have no locks
            raise ConfigError(f"storage.uri: cannot lock {folder}: {error.strerror or error}") from error
        yield lambda: None


@contextlib.contextmanager
def _lease(folder: Path, owner: str, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    file, ended = folder / "lease.json", threading.Event()

    def held() -> dict[str, Any] | None:
        try:
            remote: Any = file  # in one request: an open file must not change, and this one does at every beat
            found = json.loads(remote.fs.cat_file(remote.path))
            return found if isinstance(found, dict) else None
        except (FileNotFoundError, ValueError, RecursionError):
            return None

    def check() -> None:
        found = held()
        if found is not None and found.get("owner") != owner:
            raise _busy(folder)

    first = held()
    if first is not None and first.get("owner") != owner:
        say(f"a job that has not said goodbye holds {folder}: looking for {DEAD:.0f} s whether it still lives")
        deadline = time.monotonic() + DEAD
        while time.monotonic() < deadline:  # by its beats alone: clocks of machines differ
            time.sleep(BEAT / 2)
            now = held()
            if now is None:
                break
            if now != first:
                raise _busy(folder)
    begun = time.time()

    def write(number: int) -> None:
        file.write_text(json.dumps({"owner": owner, "begun": begun, "beat": number}))

    write(0)
    if first is None or first.get("owner") != owner:
        time.sleep(SETTLE)  # of two jobs that came at once the later writer has it
        check()

    def beat() -> None:
        number = 0
        while not ended.wait(BEAT):
            number += 1
            with contextlib.suppress(Exception):  # storage may be away for a while
                check()
                write(number)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join(BEAT)
        with contextlib.suppress(Exception):
            check()
            file.unlink(missing_ok=True)
