"""Defenses by name. A module is imported when its defense is used; a dotted path names somebody's own."""

from __future__ import annotations

import importlib

from dircluster.config import ConfigError
from dircluster.defenses.stage import Defense
from dircluster.presets import own_defense

DEFENSES = {
    "dir": "dircluster.defenses.dir",
    "hgd": "dircluster.defenses.hgd",
}


def find_defense(name: str) -> Defense:
    """The ``DEFENSE`` of the module that the table, or the dotted path itself, names. Raises ConfigError."""
    found = importlib.import_module(DEFENSES[name]).DEFENSE if name in DEFENSES else own_defense(name)
    if not isinstance(found, Defense):
        raise ConfigError(f"{name}.DEFENSE must be a dircluster.defenses.stage.Defense, got {type(found).__name__}")
    return found
