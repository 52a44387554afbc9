"""The leaderboard: every claim as a line, in Markdown and as a page that sorts, each number with n and interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dircluster.evaluation.claims import Claim, Row, read_claims
from dircluster.evaluation.results import n_of
from dircluster.evaluation.suites import how
from dircluster.files import write_whole

PAGE = Path(__file__).with_suffix(".html")
COLUMNS = {
    "natural": "natural",
    "white box": "white box",
    "fresh": "fresh + EOT",
    "wor": "Wor.Rob",
    "vote": "vote",
    "autoattack": "AutoAttack",
    "malt": "MALT",
}
"""The columns of accuracies and their titles."""
NORMS = {"linf": "L-infinity", "l2": "L2"}
INTRODUCTION = """# Leaderboard

Written by `python jobs/leaderboard.py` from the claims in [claims/](claims); the same as a page
that sorts: [leaderboard.html](leaderboard.html). [Add one of yours](extend.md#add-a-claim).

"""
READING = """Accuracy on test images, % (95 % interval). *White box*: the strongest first-order attack that knows
what the defense draws. *Fresh + EOT*: it draws again at every pass, the attack averages over draws.
*Wor.Rob*: right under the attack in the worst of several draws; *vote*: by their majority.
*Strongest*: the row that leaves least, but for Wor.Rob, votes, averaged logits and attacks on the
restored image; the table is ordered by it. *Its target*: the same of the bare target. *Verdict*:
whether the defense only hides gradients: clean, or how many questions flag it. Empty: not run; `!`:
marked, no evidence. Compare lines of the same n alone, and intervals before numbers.
"""


@dataclass(frozen=True)
class Cell:
    """What a table shows, what it is sorted by, and the evidence in words."""

    text: str
    value: float = -1.0
    words: str = ""


def write_leaderboard(claims: Path, docs: Path) -> list[Path]:
    """Write leaderboard.md and .html into ``docs`` from the folder ``claims``: -> their paths.

    Raises ConfigError for a claim that is refused.
    """
    tables = by_threat(read_claims(claims))
    files = [docs / "leaderboard.md", docs / "leaderboard.html"]
    for file, text in zip(files, (as_markdown(tables, INTRODUCTION), as_page(tables)), strict=True):
        write_whole(file, text.encode())
    return files


def by_threat(claims: Sequence[Claim]) -> dict[str, list[Claim]]:
    """Claims of the same data and ball under one title, those that keep most first.

    Data of somebody's own has no name but its fingerprint.
    """
    tables: dict[str, list[Claim]] = {}
    for claim in claims:
        norm, epsilon = claim.threat
        steps = round(255 * epsilon, 6)  # of a pixel of eight bits
        radius = f"{steps:.0f}/255" if norm == "linf" and steps == round(steps) else f"{epsilon:.4g}"
        dataset = str(claim.plain["dataset"])
        data = f"{dataset} {claim.facts['data'][:8]}" if dataset == "custom" else dataset
        title = f"{data}, {NORMS[norm]}, ε = {radius}"
        tables.setdefault(title, []).append(claim)
    return {title: sorted(each, key=lambda c: (-_accuracy(c.strongest()), c.name)) for title, each in tables.items()}


def line(claim: Claim) -> dict[str, Cell]:
    """A claim as the cells of a table, by title."""
    found, bare, costs = claim.strongest(), claim.strongest_of_target(), claim.plain["costs"]
    natural = claim.row("natural") or claim.rows[0]
    cells = {"defense": Cell(claim.name), "target": Cell(claim.target)}
    cells["n"] = Cell(n_of(natural), natural["total"])
    usual = natural["total"]
    cells |= {title: _share(claim.row(column), usual) for column, title in COLUMNS.items()}
    cells |= {"strongest": _share(found, usual), "its target": _share(bare, usual)}
    cells["verdict"] = _verdict(claim.plain.get("flags"))
    cells["parameters"] = _number(costs.get("parameters"), "{:,.0f}")
    cells["GMAC"] = _number(costs.get("gmac"), "{:.3g}")
    cells["s an image"] = _number(costs.get("seconds_per_image"), "{:.2g}", str(costs.get("machine", "")))
    cells["seed"] = Cell(str(claim.facts["seed"]), claim.facts["seed"])
    cells["commit"] = Cell(str(claim.facts["commit"])[:9], words=str(claim.facts["machine"]))
    return cells


def as_markdown(tables: Mapping[str, Sequence[Claim]], introduction: str) -> str:
    """The page as Markdown, after a title and what it was made from."""
    parts = [introduction + READING]
    for title, claims in tables.items():
        lines = [line(claim) for claim in claims]
        head = list(lines[0])
        rows = [" | ".join(cells[name].text.replace("|", "\\|") for name in head) for cells in lines]
        parts.append("\n".join([f"## {title}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]))
        parts[-1] += "".join(f"\n| {row} |" for row in rows)
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def as_page(tables: Mapping[str, Sequence[Claim]]) -> str:
    """The same as an HTML page that stands alone; a click on a title sorts by it."""
    from jinja2 import Environment

    lines = {title: [line(claim) for claim in claims] for title, claims in tables.items()}
    return Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8")).render(tables=lines) + "\n"


def _accuracy(row: Row | None) -> float:
    return -1.0 if row is None else float(row["accuracy"])


def _share(row: Row | None, usual: int) -> Cell:
    """A row's accuracy; with its number of images where that is not the ``usual`` one of the line."""
    if row is None:
        return Cell("")
    low, high = row["interval"]
    marked = " !" if row.get("marks") else ""
    text = f"{100 * row['accuracy']:.1f}{marked} ({100 * low:.1f}\u2013{100 * high:.1f})"
    text += "" if row["total"] == usual else f", n = {n_of(row)}"
    return Cell(text, row["accuracy"], f"{row['attack']}, {row['protocol']}: {how(row)}; n = {n_of(row)}")


def _verdict(flags: Sequence[str] | None) -> Cell:
    """What the verdict says; sorted, who was not asked stands below who is clean, and above who is flagged."""
    if flags is None:
        return Cell("")
    return Cell(f"{len(flags)} flagged", -1.0 - len(flags), "; ".join(flags)) if flags else Cell("clean", 1.0)


def _number(value: Any, form: str, words: str = "") -> Cell:
    return Cell("") if value is None else Cell(form.format(value), float(value), words)
