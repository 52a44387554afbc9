"""A model card says which code trained a defense, where it is not the one that writes the card, and how to load it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dircluster.config import with_values
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


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("small_cnn", '"models:/dir-digits@champion")'),
        ("timm:test_vit", '"models:/dir-digits@champion")'),
        ("ours:make", '"models:/dir-digits@champion", trust_code=True)'),
    ],
)
def test_a_target_of_ones_own_is_trusted_by_who_loads_it(architecture: str, said: str) -> None:
    run = with_values(preset("digits"), {"target.architecture": architecture})
    card = model_card(run, {"results": ROWS, "data": "0" * 64}, "c")
    assert f"load_defense({said}" in card
