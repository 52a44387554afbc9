"""Defenses by name. A module is imported when its defense is used; a dotted path names somebody's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from dircluster.config import ConfigError, RunConfig
from dircluster.defenses.recipe import Recipe
from dircluster.defenses.stage import Defense, Modules
from dircluster.presets import own_defense

DEFENSES = {
    "dir": "dircluster.defenses.dir",
    "apegan": "dircluster.defenses.apegan",
    "apegan_a": "dircluster.defenses.apegan:ADVERSARIAL",
    "hgd": "dircluster.defenses.hgd",
    "hgd_a": "dircluster.defenses.hgd:ADVERSARIAL",
    "nrp": "dircluster.defenses.nrp",
    "nrp_a": "dircluster.defenses.nrp:ADVERSARIAL",
    "jatp": "dircluster.defenses.jatp",
    "identity": "dircluster.defenses.identity",
    "finetune": "dircluster.defenses.finetune",
    "menet": "dircluster.defenses.menet",
    "ebm": "dircluster.defenses.ebm",
}
"""The module that holds each as ``DEFENSE``, or under the name behind the colon."""
UNNAMED = "dir"
"""The defense of a folder that names none: the only one that there was."""
COMPARED = {"dir": "dircluster.defenses.plain_dir"}
"""Modules whose ``compared`` says what a defense's step is timed against, by the defense's name."""


def find_defense(name: str) -> Defense:
    """The ``DEFENSE`` of the module that the table, or the dotted path itself, names. Raises ConfigError."""
    module, _, attribute = DEFENSES.get(name, "").partition(":")
    found = getattr(importlib.import_module(module), attribute or "DEFENSE") if module else own_defense(name)
    if not isinstance(found, Defense):
        raise ConfigError(f"{name}.DEFENSE must be a dircluster.defenses.stage.Defense, got {type(found).__name__}")
    return found


Variants = dict[str, tuple[RunConfig, Callable[[Modules], Recipe] | None]]
"""Steps that are timed in turns, by name: a run, and a recipe unless it is that of the run's last stage."""


def variants_of(run: RunConfig) -> Variants:
    """What a step of the run is timed in turns with.

    Nothing where the table has no row for the defense.
    """
    if run.defense not in COMPARED:
        return {}
    found: Variants = importlib.import_module(COMPARED[run.defense]).compared(run)
    return found
