"""A row of a report or a claim found again: which one is meant, how it is computed, and whether it is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dircluster.config import ConfigError
from dircluster.evaluation.attack_table import AttackSpec, find_attack
from dircluster.evaluation.results import Result, name_of

TOLERANCE = 0.02
"""Share of images by which an accuracy may differ on another kind of machine or by other code; two at the least."""
FACTS = ("defense", "digest", "data", "seed", "commit", "machine", "settings")
SETTINGS = ("norm", "epsilon", "steps", "restarts", "eot", "loss", "average")
"""Of an attack, that a row and the spec behind it must both have."""
WORDS = ("defense", "attack", "randomness")
COUNTS = {"correct": 0, "judged": 1, "total": 1}
"""What a row is called by, and what it counts, with the least of each."""


def read_rows(file: Path) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The facts and the rows of a report or a claim. Raises ConfigError where ``file`` is none, or lacks what decides
    the rows, as a report of an earlier version does.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: give the report-*.json of an evaluation, or a claim") from error
    facts = found.get("facts") if isinstance(found, dict) else None
    if not isinstance(facts, dict) or not isinstance(found.get("rows"), list):
        raise ConfigError(f"{file} is no report and no claim: it has no facts and rows")
    if missing := [name for name in FACTS if name not in facts]:
        raise ConfigError(f"{file} does not say its {missing[0]}, without which its rows cannot be computed again")
    for number, row in enumerate(found["rows"], 1):
        if lacking := _lacking(row):
            raise ConfigError(f"{file} cannot be read: its row {number} does not say its {lacking}")
    return facts, found["rows"]


def _lacking(row: Any) -> str:
    """What a row lacks to be computed again; empty where it is whole."""
    row = row if isinstance(row, dict) else {}
    lacking = [name for name in WORDS if not isinstance(row.get(name), str)]
    lacking += [name for name, least in COUNTS.items() if type(row.get(name)) is not int or row[name] < least]
    known = type(row.get("accuracy")) in (int, float) and 0 <= row["accuracy"] <= 1
    return lacking[0] if lacking else "" if known else "accuracy"


def choose(rows: Sequence[Mapping[str, Any]], which: str) -> Mapping[str, Any]:
    """The row that ``which`` says: its number in the table, from 1, or its name. Raises ConfigError."""
    names = [name_of(row) for row in rows]
    if which.isdecimal() and 1 <= int(which) <= len(rows):
        return rows[int(which) - 1]
    if which in names:
        return rows[names.index(which)]
    there = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    raise ConfigError(f"there is no row {which!r}; there are {there}")


def spec_of(row: Mapping[str, Any], table: Sequence[AttackSpec], defense: str) -> AttackSpec:
    """The attack of ``table`` behind a row. Raises ConfigError where this code plans another, or none of that name."""
    for spec in table:
        bare = spec.judged == "target"
        named = ("none" if bare else defense, spec.name, "none" if bare else spec.randomness)
        if named == (row["defense"], row["attack"], row["randomness"]):
            own = {name: getattr(spec, name) for name in SETTINGS}
            own |= {"step_size": row_step_size(spec), "protocol": spec.protocol_name}
            own |= {"judged": row["total"] * row_answers(spec)}
            for name, value in own.items():
                if value != row.get(name):
                    raise ConfigError(
                        f"row {name_of(row)} has {name.replace('_', ' ')} {row.get(name)}, and this code's has {value}:"
                        " check out the commit of the row"
                    )
            return spec
    raise ConfigError(f"this code's suite has no row {name_of(row)}: check out the commit of the row")


def row_step_size(spec: AttackSpec) -> float:
    """The step size in a row of its attack: none where it counts no steps, see Evaluation.result."""
    return spec.step_size if spec.steps and find_attack(spec.attack).counts == "steps" else 0.0


def row_answers(spec: AttackSpec) -> int:
    """How many answers to an image a row of its attack counts: those of fresh draws, or one, see Evaluation.result."""
    past = spec.judged == "target" or find_attack(spec.attack).past_purifier
    return 1 if past or spec.randomness != "fresh" or spec.protocol == "wor" else spec.draws


@dataclass(frozen=True)
class Comparison:
    """A row and what came of it again."""

    row: Mapping[str, Any]
    again: Result
    to_the_bit: bool
    """Whether it must be the same images: by the same code on the same kind of CPU. On a GPU convolutions are by what
    is fastest at the moment, and add up in any order."""

    @property
    def same_images(self) -> bool | None:
        """Whether the adversarial images are the same to the bit; None where the row does not know its own."""
        return None if self.row.get("sha256") is None else self.row["sha256"] == self.again.sha256

    @property
    def difference(self) -> float:
        """Of the accuracies, a share of the images."""
        return self.again.accuracy - float(self.row["accuracy"])

    @property
    def holds(self) -> bool:
        """The same images and accuracy where they must be the same, else an accuracy within the tolerance."""
        if self.to_the_bit:
            return self.same_images is not False and self.difference == 0
        return abs(self.difference) <= max(TOLERANCE, 2 / self.again.total) + 1e-9
