"""Versions of the code that trained and judged: commits, with a + where there were changes that no commit holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

UNKNOWN = "unknown"
"""The version of what was made before versions were recorded."""
SHORT = 9
"""Digits of a commit where people read it."""


def is_same_code(here: str, there: object) -> bool:
    """Whether two versions of the code are one. With a + they have changes that no commit holds, and never are."""
    return here == there and not here.endswith("+")


def short_version(version: str) -> str:
    """A commit in few digits, with its +; another version as it is."""
    commit = re.fullmatch(r"([0-9a-f]{40})(\+?)", version)
    return f"{commit[1][:SHORT]}{commit[2]}" if commit else version


def each_once(trained_by: Mapping[str, Iterable[str]]) -> list[str]:
    """The versions that trained stages, UNKNOWN for a stage of which none was recorded, in their order."""
    found = (tuple(versions) or (UNKNOWN,) for versions in trained_by.values())
    return list(dict.fromkeys(version for versions in found for version in versions))
