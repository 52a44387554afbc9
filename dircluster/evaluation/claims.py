"""Claims: what a defense was found to keep, in RobustBench's form, with the evidence that a number needs to count."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dircluster.attacks.threat import BALLS
from dircluster.config import ConfigError
from dircluster.evaluation.attack_table import CONTROLS
from dircluster.evaluation.marks import in_words
from dircluster.evaluation.results import own_rows, strongest, to_plain
from dircluster.evaluation.session import EvaluationReport
from dircluster.evaluation.statistics import wilson_interval

Row = Mapping[str, Any]
COSTS = ("parameters", "gmac", "seconds_per_image")
PLACES = ("scaling", "parallel", "storage", "tracking")
"""Sections that say where a run computes and what it keeps: they are none of a claim's settings."""
WORDS = ("attack", "protocol", "randomness", "norm", "loss")
NUMBERS = ("epsilon", "steps", "step_size", "restarts", "eot", "average", "draws")
"""What a row says of its attack and of how it was judged, as texts and as numbers."""
SHARES = ("mean", "worst", "always")
"""What a row says of its draws, in [0, 1]."""


def claim_of(
    entry: Mapping[str, Any], report: EvaluationReport, facts: Mapping[str, Any], costs: Mapping[str, Any]
) -> dict[str, Any]:
    """RobustBench's ``entry`` with every row of a report, the ``facts`` that decide them, and what an answer costs.

    ``facts`` are those of a report's JSON. As there, rows can be computed again (jobs/replay.py).
    """
    settings = facts["settings"]
    run = {name: section for name, section in settings["run"].items() if name not in PLACES}
    rows = to_plain(report.rows)
    found = strongest(own_rows(rows, report.defense), run["attack"]["norm"])
    return {
        **entry,
        "reported": entry["reported"] if found is None else f"{100 * found['accuracy']:.2f}",
        "defense": report.defense,
        "suite": report.suite,
        "facts": {**facts, "settings": {"defense": settings["defense"], "run": run}},
        "costs": dict(costs),
        "rows": rows,
        "seconds": [round(each, 1) for each in report.seconds],
        "flags": [flag.question for flag in report.flags] if report.verdict else None,
    }


@dataclass(frozen=True)
class Claim:
    """A claim that was read and has its evidence."""

    name: str
    """Of its file."""
    plain: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What decides its rows: seed, commit, machine, data, settings."""
        facts: Mapping[str, Any] = self.plain["facts"]
        return facts

    @property
    def run(self) -> Mapping[str, Any]:
        """The settings of the run by section."""
        run: Mapping[str, Any] = self.facts["settings"]["run"]
        return run

    @property
    def threat(self) -> tuple[str, float]:
        """Norm and radius."""
        attack = self.run["attack"]
        return str(attack["norm"]), float(attack["epsilon"])

    @property
    def target(self) -> str:
        """The classifier in words: its architecture and how it was trained."""
        target = self.run["target"]
        return f"{target['architecture']}, {target['objective']}"

    @property
    def rows(self) -> list[Row]:
        """The rows of the defense."""
        return own_rows(self.plain["rows"], self.plain["defense"])

    def strongest(self) -> Row | None:
        """The row that leaves it least in the ball of the claim."""
        return strongest(self.rows, self.threat[0])

    def strongest_of_target(self) -> Row | None:
        """The same of its bare target; None where that is what the claim is of, or was not judged.

        A defense that trains its target further, or adds nothing to it, is that target: the same attack makes the same
        images of both.
        """
        bare = [] if self.plain["defense"] == "none" else own_rows(self.plain["rows"], "none")
        found = strongest(bare, self.threat[0])
        made = {(row["attack"], row["sha256"]) for row in self.rows if row.get("sha256")}
        return None if found is None or (found["attack"], found.get("sha256")) in made else found

    def row(self, column: str) -> Row | None:
        """The row behind a column of the leaderboard, the worst where there are several; None where it was not run."""
        norm, _ = self.threat
        if column == "natural":
            return next((row for row in self.rows if row["attack"] == "natural"), None)
        attacked = [row for row in self.rows if row["epsilon"] and row["norm"] == norm]
        found = [row for row in attacked if _column(row) == column]
        return min(found, key=lambda row: float(row["accuracy"]), default=None)


def _column(row: Row) -> str:
    """The column of the leaderboard that an attacked row belongs to; empty for one of another threat, or weaker."""
    attack, protocol = str(row["attack"]), str(row["protocol"])
    if attack.startswith(("transfer", "restored", "noise")):
        return ""
    if protocol.startswith("Wor.Rob"):
        return "wor"
    if protocol.startswith("MV.Rob"):
        return "vote"
    if protocol == "fresh draws":
        return "fresh" if row["average"] == 1 else ""
    others = {"malt": "malt", "autoattack-standard": "autoattack", "square": ""}  # the last sees no gradient
    return others.get(attack, "white box")


def read_claim(file: Path) -> Claim:
    """The claim in ``file``. Raises ConfigError, one line, where it lacks n, an interval, seed, commit or settings."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"claim {file} cannot be read: it must be the JSON that --export writes") from error
    if problem := problem_of(plain):
        raise ConfigError(f"claim {file} is refused: {problem}; jobs/evaluate.py --export writes one that is whole")
    return Claim(file.stem, plain)


def read_claims(folder: Path) -> list[Claim]:
    """All claims in ``folder``, by name. Raises ConfigError for one that is refused, and where there are none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"there are no claims (*.json) in {folder}")
    return [read_claim(file) for file in files]


def problem_of(plain: Any) -> str:
    """Why what was read is refused as a claim, in words; empty where it is none."""
    return next(iter(_problems(plain)), "")


def _problems(plain: Any) -> Iterable[str]:
    """What a claim lacks, in words, the first thing first."""
    if not isinstance(plain, dict) or not isinstance(plain.get("rows"), list) or not plain["rows"]:
        yield "it has no rows"
        return
    facts = plain.get("facts")
    if not isinstance(facts, dict):
        yield "it has no facts (seed, commit, machine, settings)"
        return
    seed, commit = facts.get("seed"), facts.get("commit")
    if not isinstance(seed, int) or isinstance(seed, bool):
        yield "it has no seed"
    if not isinstance(commit, str) or not commit:
        yield "it has no commit"
    elif commit.endswith("+"):
        yield f"it was found by code that no commit holds ({commit[:9]} and changes)"
    for name in ("machine", "data", "defense", "digest"):
        if not isinstance(facts.get(name), str):
            yield f"it does not say its {name}"
    run = _inside(facts, "settings", "run")
    for section, name in (("target", "architecture"), ("target", "objective"), ("data", "name")):
        if name not in _inside(run, section):
            yield f"its settings have no {section}.{name}"
    norm, epsilon = (_inside(run, "attack").get(name) for name in ("norm", "epsilon"))
    if not isinstance(norm, str) or norm not in BALLS:
        yield f"its settings have no attack.norm, which is {' or '.join(BALLS)}"
    if not _is_number(epsilon) or not epsilon:
        yield "its settings have no attack.epsilon above 0"
    for name in ("defense", "dataset"):
        if not isinstance(plain.get(name), str):
            yield f"it does not say its {name}"
    costs, flags = plain.get("costs"), plain.get("flags")
    if not isinstance(costs, dict):
        yield "it does not say its costs (each may be null)"
    elif any(costs.get(name) is not None and not _is_number(costs[name]) for name in COSTS):
        yield f"its costs ({', '.join(COSTS)}) are no numbers"
    if flags is not None and not (isinstance(flags, list) and all(isinstance(flag, str) for flag in flags)):
        yield "its flags are no list of texts"
    for row in plain["rows"]:
        yield from _row_problems(row, norm, epsilon)
    if not own_rows(plain["rows"], str(plain.get("defense"))):
        yield f"no row is of {plain.get('defense')}, which it is a claim of"


def _row_problems(row: Any, norm: Any, epsilon: Any) -> Iterable[str]:
    """The same of a row of a claim for the ball of ``norm`` and radius ``epsilon``."""
    if not isinstance(row, dict) or not isinstance(row.get("defense"), str):
        yield "a row does not say of what it is"
        return
    name = f"row {row.get('attack')} of {row['defense']}"
    missing = [each for each in WORDS if not isinstance(row.get(each), str)]
    missing += [each for each in NUMBERS if not _is_number(row.get(each))]
    if missing:
        yield f"{name} does not say its attack's {missing[0]}"
        return
    total, accuracy, interval = row.get("total"), row.get("accuracy"), row.get("interval")
    if not isinstance(total, int) or isinstance(total, bool) or total < 1:
        yield f"{name} has no n (total)"
    elif not _is_share(accuracy):
        yield f"{name} has no accuracy in [0, 1]"
    elif not _is_interval(interval, accuracy):
        yield f"{name} has no interval around its accuracy"
    elif not _is_wide(interval, accuracy, total):
        yield f"{name} has an interval that is narrower than the 95 % one of {total} images"
    elif not _are_counts(row.get("correct"), row.get("judged"), accuracy):
        yield f"{name} does not say of how many answers how many are correct, or has another accuracy"
    elif lacking := [each for each in SHARES if not _is_share(row.get(each))]:
        yield f"{name} has no {lacking[0]} of its draws in [0, 1]"
    elif not all(_is_control(row.get(each)) for each in CONTROLS):
        yield f"{name} has a control without its shares"
    elif not _are_marks(row.get("marks") or []) or not (row.get("luck") is None or _is_share(row["luck"])):
        yield f"{name} has marks or a luck that cannot be read"
    elif row["norm"] == norm and row["epsilon"] not in (0, epsilon):
        yield f"{name} has epsilon {row['epsilon']:.4g}, but the claim is of {epsilon:.4g}"


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number from 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_share(value: Any) -> bool:
    return _is_number(value) and value <= 1


def _is_interval(value: Any, accuracy: Any) -> bool:
    if not isinstance(value, Sequence) or len(value) != 2 or not all(map(_is_share, value)):
        return False
    low, high = value
    return bool(low < high and low - 1e-9 <= accuracy <= high + 1e-9)


def _is_wide(interval: Any, accuracy: Any, total: int) -> bool:
    """Whether an interval is as wide as Wilson's, which rows have."""
    low, high = wilson_interval(accuracy * total, total)
    return bool(interval[0] <= low + 1e-6 and interval[1] >= high - 1e-6)


def _are_counts(correct: Any, judged: Any, accuracy: Any) -> bool:
    """Whether an accuracy is that of its counts."""
    if type(correct) is not int or type(judged) is not int or not 0 <= correct <= judged or judged < 1:
        return False
    return bool(abs(correct / judged - accuracy) <= 1e-6)


def _is_control(value: Any) -> bool:
    """Whether ``value`` is a results.Control as plain data, or None."""
    shares = ("accuracy", "worst", "always")
    return value is None or (isinstance(value, dict) and all(_is_share(value.get(share)) for share in shares))


def _are_marks(value: Any) -> bool:
    """Whether ``value`` is a list of marks.Mark as plain data."""
    try:
        in_words(value)
    except (KeyError, TypeError, ValueError):
        return False
    return isinstance(value, list)


def _inside(plain: Any, *names: str) -> Mapping[str, Any]:
    """A dictionary inside dictionaries; an empty one where there is none."""
    for name in names:
        plain = plain.get(name) if isinstance(plain, dict) else None
    return plain if isinstance(plain, dict) else {}
