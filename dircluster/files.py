"""Files that are either whole or absent, whether a folder takes any, and what Git leaves in place of one."""

from __future__ import annotations

import os
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one which Git LFS did not fetch."""
FETCH = "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"


def check_writable(folder: Path) -> None:
    """Write a file in ``folder`` and remove it. Raises OSError where it takes none."""
    probe = folder / f".write-probe-{os.getpid()}"
    probe.write_bytes(bytes(4096))  # a full disk takes an empty file
    probe.unlink(missing_ok=True)


def write_whole(file: Path, blob: bytes) -> None:
    """Write a file that is either whole or absent, as every object in object storage is."""
    if not isinstance(file, Path):
        file.write_bytes(blob)
        return
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # two jobs may find the same at the same time
    partial.write_bytes(blob)
    partial.replace(file)
