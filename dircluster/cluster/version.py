"""Which code runs: what a record says, and what two processes of one run must have in common."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import dircluster


def source_version() -> str:
    """Version of this package and a digest of its source."""
    folder = Path(dircluster.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return f"{dircluster.__version__} ({digest.hexdigest()[:8]})"


@functools.cache
def commit() -> str:
    """The version of this code: a git commit, with + where files differ from it; asked once, for files may change
    under a process.

    Outside a checkout of it, as in a job's copy of the working directory or in another project's environment, it is
    DIRCLUSTER_COMMIT, which an image sets, or the package's version and a digest of its source.
    """
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError):
        sha = git("rev-parse", "HEAD")
        if sha and git("ls-files", str(Path(__file__).resolve())):
            return sha + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    return os.environ.get("DIRCLUSTER_COMMIT") or source_version()
