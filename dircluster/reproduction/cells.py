"""Cells: what came out of the seeds of a line, beside what the paper prints."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dircluster.evaluation.marks import in_words
from dircluster.evaluation.results import name_of, worst_attacked
from dircluster.evaluation.statistics import wilson_interval
from dircluster.evaluation.suites import how
from dircluster.reproduction.exhibits import MEASURED, OWN_TARGET, Exhibit, Line, Printed
from dircluster.reproduction.plan import Plan

Row = Mapping[str, Any]
Rows = Sequence[Row | None]
"""A row a seed, None where it gives none."""
STRONGEST = "strongest"
"""The column of the row that leaves a defense least."""
QUERIES = 5000
"""Of Square in AutoAttack standard, which its name does not say."""


@dataclass(frozen=True)
class Found:
    """What was measured at each seed: shares of images, or in the unit of the column."""

    values: tuple[float, ...]
    images: int = 0
    """Test images at each seed; 0 where none were judged."""
    attack: str = ""
    """As rows of results call it, with what the attacker knows."""
    how: str = ""
    """Its settings, all that differ over the seeds, and why a row of them is marked."""
    marked: bool = False
    """Whether a seed's row is marked: its accuracy is no evidence."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float:
        """Over seeds (n - 1); NaN of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, of the mean as a share of the images of one seed: the test split is the same for all."""
        return wilson_interval(self.mean * self.images, self.images) if self.images else None


@dataclass(frozen=True)
class Cell:
    """A line under a column."""

    line: str
    column: str
    found: Found | None = None
    error: str = ""
    """Why nothing was found, or not at all seeds."""
    printed: Printed | None = None
    difference: float | None = None
    """Found less printed, where both are of the same data and attack, in the unit of the printed number."""
    gain: float | None = None
    """Over the bare target, points: the mean over the seeds at which both ended."""
    printed_gain: float | None = None
    commands: tuple[str, ...] = ()
    """That make it again, one a seed."""
    replays: tuple[str, ...] = ()
    """That compute its row again from the finished weights, one a seed that has a claim."""
    factor: float = 1.0
    """Of the schedules that it was trained by."""
    seeds: int = 0
    """That were asked for; 0 where that is not known."""

    @property
    def lacking(self) -> bool:
        """Whether some seeds gave a number, and others none."""
        return self.found is not None and len(self.found.values) < self.seeds

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        plain = asdict(self)
        if self.found is not None:
            low_high = self.found.interval
            plain["found"] |= {
                "mean": self.found.mean,
                "sd": None if math.isnan(self.found.deviation) else self.found.deviation,
                "interval": None if low_high is None else list(low_high),
            }
        return plain


@dataclass(frozen=True)
class Outcome:
    """How a training or a transfer ended."""

    rows: tuple[Row, ...] = ()
    checkpoint: str = ""
    """The folder of the finished defense; empty where there is none."""
    error: str = ""
    commands: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    """By column of MEASURED."""
    untimed: Mapping[str, str] = field(default_factory=dict)
    """Why it could not be timed, by the same columns."""
    claim: Mapping[str, Any] | None = None
    """Its rows with the evidence of each, as a leaderboard takes them."""
    claim_file: str = ""
    """Where the page keeps it."""
    trained_by: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The versions of the code that trained each stage, as far as that was recorded."""


def row_of(rows: Sequence[Row], column: str) -> Row | None:
    """The defense's row that ``column`` names, with any steps and EOT: of attacks the one that knows the draws, of
    natural images that of fresh draws, where there are several.
    """
    pattern = re.compile(re.sub(r"\d+", r"\\d+", column) + r"(-eot\d+)?")
    own = [row for row in rows if row["defense"] != "none" and pattern.fullmatch(row["attack"])]
    last = "fixed" if column == "natural" else "fresh"
    return min(own, key=lambda row: row["randomness"] == last, default=None)


def cells_of(
    plan: Plan, exhibit: Exhibit, outcomes: Mapping[str, Outcome], norm: str, comparable: bool, again: str = ""
) -> list[list[Cell]]:
    """The cells of an exhibit, a list a line: its columns, then the strongest attack.

    ``outcomes`` by key; ``comparable`` says whether the printed numbers are of what was trained and judged, but for a
    budget; ``again`` is the command that times what is timed.
    """
    made = []
    for line in exhibit.lines:
        ended = [outcomes[unit.key] for unit in plan.units(exhibit, line)]
        bare = next((other for other in exhibit.lines if _is_bare_of(other, line)), None)
        below = [] if bare is None else [outcomes[unit.key] for unit in plan.units(exhibit, bare)]
        columns = []
        for column in (*exhibit.columns, STRONGEST):
            rows = _rows(ended, column, norm)
            under = _met(ended, below, norm) if column == STRONGEST else _rows(below, column, norm)
            found = _measured(ended, column) if column in MEASURED else _found(rows)
            printed, at_bare = line.printed.get(column), bare.printed.get(column) if bare else None
            scale = 1 if column in MEASURED else 100
            same = comparable and all(_is_own(row, column) for row in rows if row is not None)
            errors = [*(each.error for each in ended), *(each.untimed.get(column, "") for each in ended)]
            columns.append(
                Cell(
                    line.label,
                    column,
                    found,
                    "; ".join(dict.fromkeys(error for error in errors if error)),
                    printed,
                    scale * found.mean - printed.value if found and printed and same else None,
                    _gain(rows, under),
                    printed.value - at_bare.value if printed and at_bare else None,
                    (again,) if column in MEASURED else tuple(command for each in ended for command in each.commands),
                    tuple(_replay(end, row) for end, row in zip(ended, rows, strict=True) if end.claim_file and row),
                    plan.factor,
                    1 if column in MEASURED else len(ended),  # one seed is timed
                )
            )
        made.append(columns)
    return made


def _replay(end: Outcome, row: Row) -> str:
    return f"python jobs/replay.py {shlex.quote(end.claim_file)} {name_of(row)}"


def _is_bare_of(other: Line, line: Line) -> bool:
    mine = other is line or line.system.name in OWN_TARGET
    return other.system.name == "identity" and not mine and other.system.target == line.system.target


def _is_own(row: Row, column: str) -> bool:
    """Whether a row is of the very attack that a column names, at full length."""
    named = re.fullmatch(re.escape(column) + r"(-eot\d+)?", row["attack"]) is not None
    whole = row["steps"] == QUERIES or not column.startswith("autoattack")
    return named and whole and row["restarts"] == 1


def _rows(ended: Sequence[Outcome], column: str, norm: str) -> list[Row | None]:
    """What each seed gives for a column of attacks."""
    if column in MEASURED:
        return [None] * len(ended)
    return [worst_attacked(each.rows, norm) if column == STRONGEST else row_of(each.rows, column) for each in ended]


def _met(ended: Sequence[Outcome], below: Sequence[Outcome], norm: str) -> list[Row | None]:
    """What leaves the bare target least at each seed, of the attacks that the line met too.

    Exhibits share their bare targets, and of their suites the longest judges these: to be compared with what a line of
    a shorter one met, that would be too little.
    """

    def kind(row: Row) -> str:
        return re.sub(r"-eot\d+$", "", row["attack"])

    made = []
    for line, bare in zip(ended, below, strict=False):
        kinds = {kind(row) for row in line.rows if row["defense"] != "none"}
        made.append(worst_attacked([row for row in bare.rows if kind(row) in kinds], norm))
    return made


def _measured(ended: Sequence[Outcome], column: str) -> Found | None:
    """What the seeds that were timed give; None where none was."""
    values = tuple(each.measured[column] for each in ended if column in each.measured)
    return Found(values) if values else None


def _found(seeds: Rows) -> Found | None:
    """What the seeds that ended well give; None where they give nothing."""
    rows = [row for row in seeds if row is not None]
    if not rows:
        return None
    names = (f"{row['attack']}, {row['randomness']}".removesuffix(", none") for row in rows)
    values = tuple(row["accuracy"] for row in rows)
    marked = any(row.get("marks") for row in rows)
    settings = ("; ".join(part for part in (how(row, columns=True), _marks(row)) if part) for row in rows)
    return Found(
        values, rows[0]["total"], " / ".join(dict.fromkeys(names)), " / ".join(dict.fromkeys(settings)), marked
    )


def _marks(row: Row) -> str:
    """Why a row's accuracy is no evidence; empty where it is not marked."""
    return f"marked: {in_words(row['marks'])}" if row.get("marks") else ""


def _gain(rows: Rows, under: Rows) -> float | None:
    """Points of ``rows`` over ``under``, the same seeds of another line: the mean over those that both have."""
    pairs = [(row, other) for row, other in zip(rows, under, strict=False) if row is not None and other is not None]
    return 100 * statistics.fmean(row["accuracy"] - other["accuracy"] for row, other in pairs) if pairs else None
