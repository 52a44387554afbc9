"""Defenses by name. A module is imported when its defense is used; a dotted path names somebody's own."""

from __future__ import annotations

import importlib

from dircluster.config import ConfigError
from dircluster.defenses.stage import Defense

DEFENSES = {
    "dir": "dircluster.defenses.dir",
    "hgd": "dircluster.defenses.hgd",
}


def find_defense(name: str) -> Defense:
    """The ``DEFENSE`` of the module that the table, or the dotted path itself, names. Raises ConfigError."""
    path = DEFENSES.get(name, name)
    try:
        found = importlib.import_module(path).DEFENSE
    except Exception as error:  # somebody's code may raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"there is no defense {name!r} ({line}); there are {', '.join(DEFENSES)}") from error
    if not isinstance(found, Defense):
        raise ConfigError(f"{path}.DEFENSE must be a dircluster.defenses.stage.Defense, got {type(found).__name__}")
    return found
