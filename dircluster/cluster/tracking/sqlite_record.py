"""A record in an SQLite file: made by one job at a time, and right again where its folder was moved or copied."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from dircluster.files import locked

MOVED_TAG = "dircluster.moved_from"
"""Tag of an experiment: the storage folders, as a JSON list, that its record lay in before."""
POINTS = ("metrics", "latest_metrics")
"""Tables without a path, which are long."""


def file_of(uri: str) -> Path | None:
    """The file that a tracking URI names; None where it is a server's."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def opening(uri: str, storage: str) -> Iterator[None]:
    """Hold the record at ``uri`` while MLflow makes or migrates its tables: two jobs may find an empty folder at once.

    A record that lies in the folder ``storage`` speaks of that folder afterwards, wherever it was written.
    """
    file = file_of(uri)
    if file is None:
        yield
        return
    with locked(file.parent / f"{file.name}.lock"):
        if file.exists() and file.resolve().parent == Path(storage):
            _follow(file, storage)
        yield


def _follow(file: Path, here: str) -> None:
    """Replace the folder that a moved or copied record speaks of by ``here``, where it lies now."""
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as base, base:
        tables = [name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        if "experiments" not in tables:
            return
        places = base.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
        for experiment, place in places:
            before = str(place or "").removesuffix("/artifacts")
            if f"{before}/artifacts" != place or before == here or "://" in before or _is_there(before, here, file):
                continue
            for table in tables:
                if table not in POINTS:
                    _replace(base, table, before, here)
            key = (MOVED_TAG, experiment)
            known = base.execute(
                "SELECT value FROM experiment_tags WHERE key = ? AND experiment_id = ?", key
            ).fetchone()
            former = [before, *(json.loads(known[0]) if known else [])]
            base.execute(
                "INSERT OR REPLACE INTO experiment_tags (key, experiment_id, value) VALUES (?, ?, ?)",
                (*key, json.dumps(former)),
            )


def _is_there(before: str, here: str, file: Path) -> bool:
    """Whether artifacts lie in the folder ``before`` still: it is that of ``file`` by another name, or was meant."""
    other = Path(before) / file.name
    if other.exists():
        return other.samefile(file)
    return (Path(before) / "artifacts").is_dir() and not (Path(here) / "artifacts").is_dir()


def _replace(base: sqlite3.Connection, table: str, before: str, here: str) -> None:
    columns = base.execute(f'PRAGMA table_info("{table}")').fetchall()
    for name in (column[1] for column in columns if "CHAR" in column[2].upper() or "TEXT" in column[2].upper()):
        base.execute(
            f'UPDATE "{table}" SET "{name}" = ? || substr("{name}", ?)'
            f' WHERE "{name}" = ? OR substr("{name}", 1, ?) = ?',
            (here, len(before) + 1, before, len(before) + 1, f"{before}/"),
        )
