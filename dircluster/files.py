"""Files that are either whole or absent, and what Git leaves in place of one."""

from __future__ import annotations

import os
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one which Git LFS did not fetch."""
FETCH = "is a pointer of Git LFS, not the file itself: git lfs pull fetches it"


def write_whole(file: Path, blob: bytes) -> None:
    """Write a file that is either whole or absent, as every object in object storage is."""
    if not isinstance(file, Path):
        file.write_bytes(blob)
        return
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")  # two jobs may find the same at the same time
    partial.write_bytes(blob)
    partial.replace(file)
