"""Versions of the code."""

from __future__ import annotations

import pytest

from dircluster.evaluation.versions import each_once, is_same_code, short_version


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [("abc", "abc", True), ("abc", "abd", False), ("abc+", "abc+", False), ("abc+", "abc", False)],
)
def test_changes_that_no_commit_holds_are_never_the_same_code(here: str, there: str, same: bool) -> None:
    assert is_same_code(here, there) == same


@pytest.mark.parametrize(
    ("version", "short"),
    [
        ("0123456789" * 4, "012345678"),
        (f"{'0123456789' * 4}+", "012345678+"),
        ("0.3.1", "0.3.1"),
        ("unknown", "unknown"),
    ],
)
def test_a_commit_is_read_in_few_digits(version: str, short: str) -> None:
    assert short_version(version) == short


def test_each_version_is_named_once() -> None:
    assert each_once({"target": ["a", "b"], "pretrain": [], "dir": ("b", "c")}) == ["a", "b", "unknown", "c"]
    assert each_once({}) == []
