"""The findings as one HTML page that stands alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dircluster.doctor.findings import Finding, brief

PAGE = Path(__file__).with_name("page.html")


def to_html(findings: Sequence[Finding], facts: Mapping[str, str], verdict: str) -> str:
    """A table of all findings under what is known of the machine; ``verdict`` is the sentence at its top."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(findings=findings, facts=facts, verdict=verdict, figure_of=figure_of)


def figure_of(finding: Finding) -> str:
    """A figure and its unit; empty where there is none."""
    return "" if finding.figure is None else f"{brief(finding.figure)} {finding.unit}".strip()
