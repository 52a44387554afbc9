"""Files that are whole or absent, or locked; whether one can be written; and what Git leaves in place of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one which Git LFS did not fetch."""
FETCH = "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"


def check_writable(folder: Path) -> None:
    """Write a file in ``folder`` and remove it. Raises OSError where it takes none."""
    probe = folder / f".write-probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(4096))  # a full disk takes an empty file
    finally:
        probe.unlink(missing_ok=True)


def check_file(file: Path) -> None:
    """Raises OSError, whose ``strerror`` says why, where ``file`` cannot be written; what it holds stays.

    One that is there, or a pipe such as /dev/stdout, is written in place: its folder may take no others.
    """
    if file.is_dir():
        raise OSError(errno.EISDIR, "it is a folder")
    if not file.parent.is_dir():
        raise OSError(errno.ENOENT, "its folder does not exist")
    if not file.exists():
        check_writable(file.parent)
    elif not os.access(file, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def write_whole(file: Path, blob: bytes) -> None:
    """Write a file that is either whole or absent, as every object in object storage is."""
    if not isinstance(file, Path):
        file.write_bytes(blob)
        return
    with replacing(file) as partial:
        partial.write_bytes(blob)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yields a new file's path beside ``file``, whose place it takes at the end; after an error nothing is changed.

    No other has its name: two jobs may write the same at the same time, on two machines too, where the numbers of
    their processes are equal. A pipe or a device is written in place.
    """
    if file.exists() and not file.is_file():
        yield file
        return
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # a full disk has taken some of it
        raise


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock on ``file``, which is made: others on this machine wait. Nothing is held where there are no locks.

    Raises OSError where ``file`` cannot be made.
    """
    with file.open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
