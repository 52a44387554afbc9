"""Whole runs by name. A preset's docstring is a promise: the command, what it costs, and what was measured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dircluster.config import ANY_ERROR, ConfigError, RunConfig, from_dict, named_line, to_dict
from dircluster.presets import apegan, dir, ebm, finetune, hgd, identity, jatp, menet, nrp

PRESETS: dict[str, Callable[[], RunConfig]] = {
    **dir.PRESETS,
    **apegan.PRESETS,
    **hgd.PRESETS,
    **nrp.PRESETS,
    **jatp.PRESETS,
    **menet.PRESETS,
    **ebm.PRESETS,
    **identity.PRESETS,
    **finetune.PRESETS,
}
RUNS: dict[str, type[RunConfig]] = {
    run.defense: run
    for run in (
        dir.DirRun,
        apegan.ApeganRun,
        apegan.ApeganAdversarialRun,
        hgd.HgdRun,
        hgd.HgdAdversarialRun,
        nrp.NrpRun,
        nrp.NrpAdversarialRun,
        jatp.JatpRun,
        menet.MenetRun,
        ebm.EbmRun,
        identity.IdentityRun,
        finetune.FinetuneRun,
    )
}
"""The settings of each defense of this package."""


def preset(name: str, defense: str = "") -> RunConfig:
    """The run of that name; one of ``defense``, where that is given, as in ``package.module:NAME``.

    A defense without presets has one of the empty name, its settings as they are. Raises ConfigError.
    """
    module, colon, own = name.rpartition(":")
    if colon:
        name, defense = own, module
    known = presets_of(defense)
    if name in known:
        return _made(name, known[name], run_type(defense) if defense else RunConfig)
    if not defense:
        near = get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {name!r}; {hint}")
    there = f"there are {', '.join(known)}" if "" not in known else "it has no PRESETS: leave the name out"
    other = f", which is of defense {PRESETS[name]().defense}" if name in PRESETS else ""
    raise ConfigError(f"defense {defense} has no preset {name!r}{other}; {there}")


def presets_of(defense: str) -> Mapping[str, Callable[[], RunConfig]]:
    """The presets of a defense, the usual one first; all of this package where ``defense`` is empty."""
    if defense in RUNS:
        return {name: make for name, make in PRESETS.items() if make().defense == defense}
    if not defense:
        return PRESETS
    run = run_type(defense)
    found = getattr(sys.modules[defense], "PRESETS", None) or {"": run}
    if not isinstance(found, Mapping) or not all(isinstance(n, str) and callable(make) for n, make in found.items()):
        raise ConfigError(f"{defense}.PRESETS must map names to callables that return a {run.__name__}")
    return found


def run_type(defense: str) -> type[RunConfig]:
    """The settings of a defense by its name, or by the module of somebody's own. Raises ConfigError."""
    if defense in RUNS:
        return RUNS[defense]
    found: type[RunConfig] = own_defense(defense).run
    return found


def own_defense(module: str) -> Any:
    """``DEFENSE`` of a module of the user's own. Raises ConfigError where there is none, or none that can be used."""
    try:
        found = importlib.import_module(module)
    except ANY_ERROR as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no defense {module!r}: it is none of {', '.join(RUNS)}, and no module in the current folder"
                " or installed"
            ) from error
        raise ConfigError(f"defense {module} cannot be imported: {named_line(error)}") from error
    if not hasattr(found, "DEFENSE"):
        raise ConfigError(f"{module} has no DEFENSE: give a module with one, a dircluster.defenses.stage.Defense")
    defense = found.DEFENSE
    run = getattr(defense, "run", None)
    if not (isinstance(run, type) and issubclass(run, RunConfig)):
        kind = type(defense).__name__
        raise ConfigError(
            f"{module}.DEFENSE must be a dircluster.defenses.stage.Defense whose run is a RunConfig, got {kind}"
        )
    for where, name in ((f"{run.__name__}.defense", run.defense), ("DEFENSE.name", getattr(defense, "name", ""))):
        if name != module:
            raise ConfigError(f"{where} must be {module!r}, the module that holds DEFENSE, got {name!r}")
    return defense


def _made(name: str, make: Callable[[], RunConfig], kind: type[RunConfig]) -> RunConfig:
    try:
        run = make()
    except ConfigError:
        raise
    except ANY_ERROR as error:
        raise ConfigError(f"preset {name!r}: {named_line(error)}") from error
    if not isinstance(run, kind):
        raise ConfigError(f"preset {name!r} must be a {kind.__name__}, got {type(run).__name__}")
    return run


def search_folder(folder: str) -> None:
    """Modules of the user's own are found in ``folder`` too, from now on."""
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)


def run_to_plain(run: RunConfig) -> dict[str, Any]:
    """A run as plain data that says which defense it is of, and where its module lies, for another process."""
    plain = {"defense": run.defense, "run": to_dict(run)}
    return plain if run.defense in RUNS else plain | {"folder": _folder_of(run.defense)}


def _folder_of(module: str) -> str:
    """The folder that ``module`` is imported from."""
    top = importlib.import_module(module.partition(".")[0])
    places = list(getattr(top, "__path__", [])) or [top.__file__ or ""]
    return str(Path(places[0]).resolve().parent)


def run_from_plain(plain: Mapping[str, Any]) -> RunConfig:
    """The inverse of :func:`run_to_plain`: the folder is that of a module that is not this project's."""
    if plain["defense"] not in RUNS:
        search_folder(plain.get("folder", ""))
    made: RunConfig = from_dict(run_type(plain["defense"]), plain["run"])
    return made
