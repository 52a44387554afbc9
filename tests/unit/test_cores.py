"""Cores that a process may use: the machine's, its affinity's, or its quota's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dircluster import cores as module
from dircluster.cores import cores, quota


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """192 cores, of which the system lets this process run on 16, under no quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(module, "GROUPS", tmp_path)
    monkeypatch.setattr(module, "MEMBERSHIP", tmp_path / "membership")
    for name in module.BINDS:
        monkeypatch.delenv(name, raising=False)


def limit(root: Path, folder: str, **files: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text)


def test_without_a_quota_the_affinity_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores() == 16
    monkeypatch.setenv("OMP_PROC_BIND", "true")  # the first thread is bound to one core, the others to others
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert cores() == 192
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delenv("OMP_PROC_BIND")
    assert cores() == 192


@pytest.mark.parametrize(
    ("text", "count"),
    [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 16), ("x", 16), ("1 0", 16)],
)
def test_a_quota_of_the_second_version(text: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/jobs/7\n")
    limit(tmp_path, "jobs/7", cpu__max=text)
    assert cores() == count


def test_the_least_of_the_groups_around_it_counts(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/jobs/7/step\n")
    limit(tmp_path, "jobs/7/step", cpu__max="max 100000")
    limit(tmp_path, "jobs", cpu__max="300000 100000")
    limit(tmp_path, "others", cpu__max="100000 100000")
    assert quota() == 3


def test_a_quota_of_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("5:memory:/jobs\n4:cpu,cpuacct:/jobs\n")
    limit(tmp_path, "cpu,cpuacct/jobs", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert quota() == float("inf")
    limit(tmp_path, "cpu,cpuacct", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    assert quota() == 2


def test_where_the_kernel_says_nothing_there_is_no_quota() -> None:
    assert quota() == float("inf")
