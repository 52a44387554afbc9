"""What was foretold of a run, kept in its storage folder by --dry-run, beside what the run then takes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dircluster.cluster.storage import is_remote, open_path
from dircluster.config import RunConfig, StorageConfig, digest, local_path, to_dict
from dircluster.files import write_whole

Row = Mapping[str, Any]
"""The fields of a training.forecast.Forecast, of a stage or the evaluation."""


def keep(rows: Sequence[Row], config: RunConfig, launcher: str) -> None:
    """Keep the forecast of a run with absolute paths, where its storage is a folder of this machine that takes it."""
    file = _file(config, launcher)
    if file is not None:
        with contextlib.suppress(OSError):  # a dry run tells, whether or not anybody will compare
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(list(rows), indent=1).encode())


def kept(config: RunConfig, launcher: str) -> list[Row]:
    """What the last dry run of the same settings foretold, by whatever seed; nothing where there was none."""
    file = _file(config, launcher)
    try:
        found = [] if file is None else json.loads(file.read_text())
        return [{**row, "seconds": float(row["seconds"])} for row in found]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _file(config: RunConfig, launcher: str) -> Path | None:
    if is_remote(config.storage.uri):
        return None
    settings = [{**config.identity, "seed": 0}, to_dict(config.scaling), to_dict(config.parallel), launcher]
    return local_path(config.storage.uri) / "forecasts" / f"{digest(settings)[:12]}.json"


def beside(made: Sequence[Row], outcome: Mapping[str, Any], settings: StorageConfig) -> list[dict[str, Any]]:
    """What was foretold beside what a run took, of what was not taken from an earlier run.

    Seconds; bytes at the peak, of the first worker; bytes that stay in storage.
    """
    folders = outcome.get("folders", {})
    return [
        {
            "name": one["name"],
            "foretold": round(one["seconds"], 1),
            "took": round(outcome["seconds"][one["name"]], 1),
            "foretold_memory": one["memory"],
            "memory": outcome["memory"][one["name"]],
            "foretold_stored": one["stored"],
            "stored": _stored(folders[one["name"]], settings) if one["name"] in folders else 0,
        }
        for one in made
        if one["name"] in outcome.get("seconds", {})
    ]


def _stored(folder: str, settings: StorageConfig) -> int | None:
    """Bytes of the files in a folder; None where storage does not say: the run has ended well."""
    try:
        return sum(file.stat().st_size for file in open_path(folder, settings).rglob("*") if file.is_file())
    except Exception:  # whatever object storage raises
        return None
