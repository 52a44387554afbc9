"""The page: each exhibit as the paper prints it, then the evidence of every cell, as Markdown and as HTML."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dircluster.evaluation.pictures import data_uri
from dircluster.reproduction.cells import STRONGEST, Cell, Found
from dircluster.reproduction.exhibits import MEASURED, Exhibit
from dircluster.reproduction.pictures import Picture
from dircluster.reproduction.versions import Versions

TEMPLATE = Path(__file__).with_name("page.html")
EVIDENCE = ["row", "attack", "ours", "95 % interval", "seeds", "n"]
EVIDENCE += ["paper", "difference", "over None", "paper over None", "how"]
AGAIN = "These commands find what is stored, or make it: the cells of the row that stands above them."
CODE = (
    "The commits that trained the stages of each system and judged it; + stands for changes that no commit holds,"
    " unknown for what was trained before that was recorded."
)


@dataclass(frozen=True)
class Section:
    """An exhibit with what came out of it."""

    exhibit: Exhibit
    cells: Sequence[Sequence[Cell]]
    picture: Picture | None = None
    left_out: str = ""
    """Why there is no picture, where there should be one."""

    @property
    def head(self) -> list[str]:
        return ["", *self.exhibit.columns, STRONGEST]

    @property
    def grid(self) -> list[list[str]]:
        """As the paper prints it: a line of texts for each line, ours with the paper's in brackets."""
        return [[line[0].line, *(in_grid(cell) for cell in line)] for line in self.cells]

    @property
    def evidence(self) -> list[dict[str, str]]:
        """A line of texts for each cell."""
        return [in_full(cell) for line in self.cells for cell in line if cell.found or cell.error or cell.printed]

    @property
    def commands(self) -> dict[str, list[str]]:
        """What makes the cells of each line again, one a seed, and those of its columns that are timed."""
        made = {}
        for line in self.cells:
            made[line[0].line] = [*next(cell.commands for cell in line if cell.column not in MEASURED)]
            made |= {_of_cell(cell): [*cell.commands] for cell in line if cell.column in MEASURED}
        return made

    @property
    def replays(self) -> list[str]:
        """What computes each number again, after the name of its cell."""
        return [f"{_of_cell(cell)}: {each}" for line in self.cells for cell in line for each in cell.replays]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.exhibit.name,
            "title": self.exhibit.title,
            "notes": list(self.exhibit.notes),
            "cells": [cell.to_plain() for line in self.cells for cell in line],
            "figure": dict(self.picture.data) if self.picture else {},
        }


def in_grid(cell: Cell) -> str:
    """``54.1 ± 0.4 (paper 54.27)``, what the strongest attack is, how many of the seeds gave a number where it was not
    all of them, and the factor of its schedules; ``failed`` with the reason in the evidence.
    """
    printed = "" if cell.printed is None else f"(paper {_printed(cell)})"
    ours = "" if cell.found is None else _ours(cell.column, cell.found)
    ours += _of_seeds(cell)
    if cell.found is not None and cell.column == STRONGEST:
        ours += f" by {cell.found.attack}"
    failed = "failed" if cell.error and cell.found is None else ""
    shorter = f"[{of_schedules(cell.factor)}]" if cell.factor != 1 and (ours or failed) else ""
    return " ".join(part for part in (ours, failed, shorter, printed) if part) or "-"


def in_full(cell: Cell) -> dict[str, str]:
    """A line of the evidence, by the columns of EVIDENCE."""
    found, low_high = cell.found, cell.found.interval if cell.found else None
    texts = (
        cell.line,
        found.attack if found and found.attack else cell.column,
        "failed" if found is None and cell.error else "" if found is None else _ours(cell.column, found),
        "" if low_high is None else f"{100 * low_high[0]:.1f} to {100 * low_high[1]:.1f}",
        "" if found is None else ", ".join(_number(cell.column, value) for value in found.values) + _of_seeds(cell),
        str(found.images) if found and found.images else "",
        "" if cell.printed is None else f"{_printed(cell)} ({cell.printed.where})",
        _signed(cell.difference, cell.column),
        _signed(cell.gain),
        _signed(cell.printed_gain),
        "; ".join(part for part in (found.how if found else "", of_schedules(cell.factor), cell.error) if part),
    )
    return dict(zip(EVIDENCE, texts, strict=True))


def of_schedules(factor: float) -> str:
    """The note at numbers whose schedules were multiplied; empty where they were not."""
    return "" if factor == 1 else f"schedules times {factor:g}"


def to_markdown(
    title: str, facts: Mapping[str, str], notes: Sequence[str], sections: Sequence[Section], code: Sequence[Versions]
) -> str:
    """The page as Markdown; pictures lie beside it as NAME.png."""
    lines = [f"# {title}", "", *_wrapped([f"{word}: {text}" for word, text in facts.items()]), *_wrapped(notes)]
    for section in sections:
        lines += [f"## {section.exhibit.title}", "", *_rows(section.head, section.grid), ""]
        if section.picture is not None:
            lines += [f"![{section.exhibit.title}]({section.exhibit.name}.png)", ""]
            lines += _curves(section.picture)
        if section.left_out:
            lines += [f"Picture left out: {section.left_out}", ""]
        lines += _wrapped(section.exhibit.notes)
        lines += ["**Evidence.**", "", *_rows(EVIDENCE, [list(each.values()) for each in section.evidence]), ""]
        lines += ["**Again.** " + AGAIN, ""]
        for row, commands in section.commands.items():
            lines += [f"    # {row}", *(f"    {command}" for command in commands)]
        lines.append("")
    versions = [each.to_texts() for each in code]
    if versions:
        lines += ["## Code", "", *_wrapped([CODE]), *_rows(list(versions[0]), [[*each.values()] for each in versions])]
        lines.append("")
    return "\n".join(lines)


def to_html(
    title: str, facts: Mapping[str, str], notes: Sequence[str], sections: Sequence[Section], code: Sequence[Versions]
) -> str:
    """The page as HTML that stands alone."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        facts=facts,
        notes=notes,
        sections=sections,
        columns=EVIDENCE,
        reading=CODE,
        versions=[each.to_texts() for each in code],
        data_of=data_uri,
    )


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    texts = [head, ["---"] * len(head), *([text.replace("|", "/") for text in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in texts]


def _curves(picture: Picture) -> list[str]:
    if not picture.table:
        return []
    texts = [list(line.values()) for line in picture.table]
    return [*textwrap.wrap(picture.reading, 100), "", *_rows(list(picture.table[0]), texts), ""]


def _wrapped(paragraphs: Sequence[str]) -> list[str]:
    """A list of Markdown, wrapped as documents are."""
    lines = [line for text in paragraphs for line in textwrap.wrap(f"- {text}", 100, subsequent_indent="  ")]
    return [*lines, ""] if lines else []


def _of_cell(cell: Cell) -> str:
    return f"{cell.line}, {cell.column}"


def _number(column: str, value: float) -> str:
    if column in MEASURED:
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
    return f"{100 * value:.1f}"


def _ours(column: str, found: Found) -> str:
    ours, marked = _number(column, found.mean), " !" if found.marked else ""
    return (ours if math.isnan(found.deviation) else f"{ours} ± {_number(column, found.deviation)}") + marked


def _of_seeds(cell: Cell) -> str:
    return f" ({len(cell.found.values)} of {cell.seeds} seeds)" if cell.found and cell.lacking else ""


def _printed(cell: Cell) -> str:
    assert cell.printed is not None
    value = cell.printed.value
    return f"{value:,.0f}" if value >= 100 else f"{value:g}" if cell.column in MEASURED else f"{value:.2f}"


def _signed(value: float | None, column: str = "") -> str:
    if value is None:
        return ""
    return f"{value:+,.0f}" if column in MEASURED and abs(value) >= 100 else f"{value:+.1f}"
