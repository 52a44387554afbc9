"""What sweeps keep in storage: results of trainings, for any sweep to find, and each sweep's own notes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dircluster.cluster import storage
from dircluster.cluster.sweeps.space import Settings
from dircluster.config import RunConfig, digest, to_dict
from dircluster.evaluation.sweep_table import Trial
from dircluster.training.stages import FORMAT, stage_settings, stages_of


def files_of(*runs: RunConfig) -> dict[str, Any]:
    """For digests: what tells the files that runs are given from others of their names; empty where they have none."""
    given = {uri: run.storage for run in runs for uri in (run.data.uri, run.target.uri) if uri is not None}
    return {"files": {uri: storage.version(uri, where) for uri, where in given.items()}} if given else {}


def key_of(run: RunConfig, until: str = "") -> str:
    """What decides how a run ends, or, with ``until``, what its stages up to that one end in."""
    decides: dict[str, Any] = {"until": until, "format": FORMAT, **files_of(run)}
    if until:
        planned = stages_of(run)
        names = [stage.name for stage in planned]
        before = planned[: names.index(until) + 1]
        decides |= {"data": to_dict(run.data), "given": run.target.uri}
        decides["stages"] = {stage.name: stage_settings(run, stage) for stage in before}
    return digest(decides if until else {**run.identity, **decides})


def result_of(run: RunConfig, until: str = "") -> Trial | None:
    """The result of a run that has finished, or None."""
    return _read(_file_of(run, until))


def store(run: RunConfig, trial: Trial, until: str = "") -> None:
    """Store the result of a run."""
    _write(_file_of(run, until), asdict(trial))


def _file_of(run: RunConfig, until: str) -> Path:
    return storage.open_path(run.storage.uri, run.storage) / "trials" / f"{key_of(run, until)[:24]}.json"


class Notes:
    """A sweep's own folder: its table and figure, the points that a search began, and what ASHA stopped."""

    def __init__(self, config: RunConfig, space: str, key: str) -> None:
        """``key`` tells it from other sweeps of ``config`` over spaces of that name."""
        self.folder = storage.open_path(config.storage.uri, config.storage) / "sweeps" / f"{config.name}-{space}-{key}"

    def points(self) -> list[Settings]:
        """Those that a search began, in order."""
        found = (_plain(file) for file in sorted((self.folder / "points").glob("*.json")))
        return [point for point in found if point]

    def add_point(self, number: int, settings: Settings) -> None:
        _write(self.folder / "points" / f"{number:06d}.json", settings)

    def stopped(self, settings: Settings, seed: int) -> Trial | None:
        """A trial that ASHA stopped, or None."""
        return _read(self._stopped(settings, seed))

    def add_stopped(self, trial: Trial) -> None:
        _write(self._stopped(trial.settings, trial.seed), asdict(trial))

    def add_files(self, files: Mapping[str, bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)

    def _stopped(self, settings: Settings, seed: int) -> Path:
        return self.folder / "stopped" / f"{name_of(settings, seed)}.json"


class Failures:
    """Why trials of one call of Tune failed: files that lie beside Tune's own, and go with them."""

    def __init__(self, config: RunConfig, owner: str) -> None:
        self.folder = storage.open_path(config.storage.uri, config.storage) / "ray" / owner / "failed"

    def add(self, trial: Trial) -> None:
        _write(self._file(trial.settings, trial.seed), asdict(trial))

    def of(self, settings: Settings, seed: int) -> Trial | None:
        """How a training failed, or None."""
        return _read(self._file(settings, seed))

    def _file(self, settings: Settings, seed: int) -> Path:
        return self.folder / f"{name_of(settings, seed)}.json"


def name_of(settings: Settings, seed: int) -> str:
    """A name for a training within its sweep."""
    return digest([dict(settings), seed])[:24]


def _write(file: Path, plain: Settings) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plain))


def _plain(file: Path) -> dict[str, Any] | None:
    """What was written; None where it is not there or not whole."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found


def _read(file: Path) -> Trial | None:
    plain = _plain(file)
    try:
        return None if plain is None else Trial(**plain)
    except TypeError:  # another version's
        return None
