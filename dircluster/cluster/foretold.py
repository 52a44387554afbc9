"""What was foretold of a run, which --dry-run keeps in its storage folder, and what the run then took."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dircluster.cluster.storage import is_remote, open_path
from dircluster.config import RunConfig, StorageConfig, digest, local_path, to_dict
from dircluster.files import write_whole


@dataclass(frozen=True)
class Foretold:
    """A forecast as plain data."""

    device: str
    """What it was measured on."""
    rows: Sequence[Mapping[str, Any]]
    """Of the stages and the evaluation: the fields of a training.forecast.Forecast."""


def keep(made: Foretold, config: RunConfig, launcher: str) -> None:
    """Keep the forecast of a run with absolute paths, where its storage is a folder of this machine that takes it."""
    file = _file(config, launcher)
    if file is not None:
        with contextlib.suppress(OSError):  # a dry run tells, whether or not anybody will compare
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(asdict(made), indent=1).encode())


def kept(config: RunConfig, launcher: str) -> Foretold | None:
    """What the last dry run of the same settings foretold, by whatever seed; None where there was none."""
    file = _file(config, launcher)
    try:
        found = {} if file is None else json.loads(file.read_text())
        whole = ("name", "memory", "stored")  # what the run's summary reads: an earlier version may have kept less
        rows = [{**row, "seconds": float(row["seconds"]), **{key: row[key] for key in whole}} for row in found["rows"]]
        return Foretold(str(found["device"]), rows)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _file(config: RunConfig, launcher: str) -> Path | None:
    if is_remote(config.storage.uri):
        return None
    settings = [{**config.identity, "seed": 0}, to_dict(config.scaling), to_dict(config.parallel), launcher]
    return local_path(config.storage.uri) / "forecasts" / f"{digest(settings)[:12]}.json"


def beside(made: Foretold, outcome: Mapping[str, Any], settings: StorageConfig) -> list[dict[str, Any]]:
    """What was foretold beside what a run took, of what was not taken from an earlier run.

    Seconds; bytes at the peak, of the first worker; bytes that stay in storage. What was ``resumed`` took its rest.
    """
    folders = outcome.get("folders", {})
    return [
        {
            "name": one["name"],
            "foretold": round(one["seconds"], 1),
            "took": round(outcome["seconds"][one["name"]], 1),
            "resumed": one["name"] in outcome["resumed"],
            "foretold_memory": one["memory"],
            "memory": outcome["memory"][one["name"]],
            "foretold_stored": one["stored"],
            "stored": _stored(folders[one["name"]], settings) if one["name"] in folders else 0,
        }
        for one in made.rows
        if one["name"] in outcome.get("seconds", {})
    ]


def _stored(folder: str, settings: StorageConfig) -> int | None:
    """Bytes of the files in a folder; None where storage does not say: the run has ended well."""
    try:
        return sum(file.stat().st_size for file in open_path(folder, settings).rglob("*") if file.is_file())
    except Exception:  # whatever object storage raises
        return None
