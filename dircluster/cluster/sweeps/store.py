"""What sweeps keep in storage: results of trainings, for any sweep to find, and each sweep's own notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dircluster.cluster import storage
from dircluster.cluster.plain_store import Store
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
    planned = stages_of(run)
    decides: dict[str, Any] = {"until": until, "format": FORMAT, **files_of(run)}
    if until:
        names = [stage.name for stage in planned]
        before = planned[: names.index(until) + 1]
        decides |= {"data": to_dict(run.data), "given": run.target.uri}
        decides["stages"] = {stage.name: stage_settings(run, stage) for stage in before}
    else:
        revised = {stage.name: stage.revision for stage in planned if stage.revision > 1}
        decides |= {"revised": revised} if revised else {}
        if planned[-1].keep == "last":
            decides["held_out"] = "last"  # results once kept the best of weights that were not
    return digest(decides if until else {**run.identity, **decides})


def result_of(run: RunConfig, until: str = "") -> Trial | None:
    """The result of a run that has finished, or None."""
    return _trial(_results(run).get(_called(run, until)))


def store(run: RunConfig, trial: Trial, until: str = "") -> None:
    """Store the result of a run."""
    _results(run).put(_called(run, until), asdict(trial))


def _results(run: RunConfig) -> Store:
    return Store(storage.open_path(run.storage.uri, run.storage) / "trials")


def _called(run: RunConfig, until: str) -> str:
    return key_of(run, until)[:24]


class Notes(Store):
    """A sweep's own folder: its table and figure, the points that a search began, and what ASHA stopped."""

    def __init__(self, config: RunConfig, space: str, key: str) -> None:
        """``key`` tells it from other sweeps of ``config`` over spaces of that name."""
        folder = storage.open_path(config.storage.uri, config.storage) / "sweeps"
        super().__init__(folder / f"{config.name}-{space}-{key}")

    def points(self) -> list[Settings]:
        """Those that a search began, in order, each once."""
        found = (self.get(f"points/{file.stem}") for file in sorted((self.folder / "points").glob("*.json")))
        return list({digest(point): point for point in found if point}.values())

    def add_point(self, number: int, settings: Settings) -> None:
        """Keep the ``number``-th point. Another driver of this sweep may have another of that number."""
        self.put(f"points/{number:06d}-{digest(dict(settings))[:12]}", settings)

    @property
    def repeated(self) -> int:
        """How often a search chose a point that it had chosen before."""
        return int((self.get("repeated") or {}).get("times", 0))

    @repeated.setter
    def repeated(self, times: int) -> None:
        self.put("repeated", {"times": times})

    def stopped(self, settings: Settings, seed: int) -> Trial | None:
        """A trial that ASHA stopped, or None."""
        return _trial(self.get(f"stopped/{name_of(settings, seed)}"))

    def add_stopped(self, trial: Trial) -> None:
        self.put(f"stopped/{name_of(trial.settings, trial.seed)}", asdict(trial))


class Failures(Store):
    """Why trials of one call of Tune failed: files that lie beside Tune's own, and go with them."""

    def __init__(self, config: RunConfig, owner: str) -> None:
        super().__init__(storage.open_path(config.storage.uri, config.storage) / "ray" / owner / "failed")

    def add(self, trial: Trial) -> None:
        self.put(name_of(trial.settings, trial.seed), asdict(trial))

    def of(self, settings: Settings, seed: int) -> Trial | None:
        """How a training failed, or None."""
        return _trial(self.get(name_of(settings, seed)))


def name_of(settings: Settings, seed: int) -> str:
    """A name for a training within its sweep."""
    return digest([dict(settings), seed])[:24]


def _trial(plain: Mapping[str, Any] | None) -> Trial | None:
    """The trial that was kept as plain data; None where none was, or another version's."""
    try:
        return None if plain is None else Trial(**plain)
    except TypeError:
        return None
