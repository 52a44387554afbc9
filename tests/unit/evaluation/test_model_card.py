"""A model card says which code trained a defense, where it is not the one that writes the card."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dircluster.evaluation.model_card import model_card
from dircluster.presets import preset
from tests.jobs import ROOT

ROWS = json.loads((ROOT / "docs" / "claims" / "digits-dir.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ({}, "code c"),
        ({"target": ["c"], "dir": ["c"]}, "code c"),
        ({"target": ["a", "b"], "dir": ["a"]}, "code a, b; judged by c"),
        ({"target": [], "dir": ["c"]}, "code unknown, c; judged by c"),
    ],
)
def test_the_code_that_trained(trained: dict[str, list[str]], said: str) -> None:
    outcome: dict[str, Any] = {"results": ROWS, "data": "0" * 64, "trained_by": trained}
    assert f"seed 0; {said}\n" in model_card(preset("digits"), outcome, "c")
