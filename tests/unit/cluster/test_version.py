"""Which code ran is told by its own checkout, never by another project's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dircluster.cluster.version import source_version

SAY = "from dircluster.cluster.version import commit; print(commit())"


def commit_of(package: Path) -> str:
    """What the package in that folder says of itself, in a process of its own."""
    known = {name: value for name, value in os.environ.items() if name not in ("DIRCLUSTER_COMMIT", "PYTHONPATH")}
    words = [sys.executable, "-c", SAY]  # which looks in its folder first
    done = subprocess.run(words, cwd=package, env=known, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_package_in_the_environment_of_another_project_has_not_its_commit(root: Path, tmp_path: Path) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=n", "-c", "user.email=e@localhost", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *own, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    package = tmp_path / "environment"
    ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(root / "dircluster", package / "dircluster", ignore=ignored)
    (tmp_path / ".gitignore").write_text("environment\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "of another project")
    assert commit_of(package) == source_version()
    git("add", "--force", ".")
    git("commit", "-m", "with its own copy")
    assert commit_of(package) == git("rev-parse", "HEAD")
    with (package / "dircluster" / "__init__.py").open("a") as file:
        file.write("\n")
    assert commit_of(package) == git("rev-parse", "HEAD") + "+"
