"""Whole runs by name. A preset's docstring is a promise: the command, what it costs, and what was measured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from dircluster.config import ConfigError, RunConfig, from_dict, to_dict
from dircluster.presets import dir, hgd

PRESETS: dict[str, Callable[[], RunConfig]] = {**dir.PRESETS, **hgd.PRESETS}
RUNS: dict[str, type[RunConfig]] = {run.defense: run for run in (dir.DirRun, hgd.HgdRun)}
"""The settings of each defense of this package."""


def preset(name: str) -> RunConfig:
    """The run of that name. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def run_type(defense: str) -> type[RunConfig]:
    """The settings of a defense by its name, or by the module of somebody's own. Raises ConfigError."""
    if defense in RUNS:
        return RUNS[defense]
    try:
        found: type[RunConfig] = importlib.import_module(defense).DEFENSE.run
    except Exception as error:  # somebody's code may raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"there is no defense {defense!r} ({line}); there are {', '.join(RUNS)}, or package.module with a DEFENSE"
        ) from error
    return found


def run_to_plain(run: RunConfig) -> dict[str, Any]:
    """A run as plain data that says which defense it is of, for another process."""
    return {"defense": run.defense, "run": to_dict(run)}


def run_from_plain(plain: Mapping[str, Any]) -> RunConfig:
    """The inverse of :func:`run_to_plain`."""
    made: RunConfig = from_dict(run_type(plain["defense"]), plain["run"])
    return made
