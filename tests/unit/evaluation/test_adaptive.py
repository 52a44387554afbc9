"""Attacks that know a purifier are rows of the suites for it, and for nobody else."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.defenses.table import find_defense
from dircluster.evaluation.session import plan
from dircluster.evaluation.victim import VictimModel
from dircluster.presets import preset


def rows(name: str, suite: Any, **settings: Any) -> dict[str, Any]:
    run = preset(name)
    defense = find_defense(run.defense)
    made = {part: defense.build(run, part) for part in ("purifier", "classifier")}
    victim = VictimModel(defense.defended(run, made), run.defense)
    planned = plan(victim, AttackConfig(), EvaluationConfig(suite=suite, **settings))
    return {spec.name: spec for spec in planned.table if spec.randomness != "fixed"}


@pytest.mark.parametrize("suite", ["paper", "rigorous"])
def test_what_broke_it_is_a_row(suite: str) -> None:
    menet, ebm = rows("digits_menet_smoke", suite), rows("digits_ebm_smoke", suite)
    broke = menet["bpda200-eot41"]
    assert (broke.attack, broke.steps, broke.eot, broke.randomness) == ("bpda", 200, 41, "fresh")
    assert broke.step_size == pytest.approx(0.2 / 255)
    assert (menet["projector40-eot20"].attack, menet["projector40-eot20"].step_size) == ("pgd", 2 / 255)
    assert (ebm["bpda50-eot1"].attack, ebm["bpda50-eot1"].step_size) == ("bpda", 2 / 255)
    assert (ebm["full-gradient50-eot10"].attack, ebm["full-gradient50-eot10"].eot) == ("pgd", 10)  # of 2 chains each


def test_settings_shorten_them_too() -> None:
    short = rows("digits_menet_smoke", "paper", steps=3, eot=2, draws=5)["bpda3-eot2"]
    assert (short.steps, short.eot, short.draws, short.step_size) == (3, 2, 5, 2 / 255)


def test_others_do_not_meet_them() -> None:
    assert not {"projector40-eot20", "full-gradient50-eot10"} & set(rows("digits_menet_smoke", "quick"))
    anybody = VictimModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "x")
    assert anybody.adaptive == ()
    labels = [s.label for s in plan(anybody, AttackConfig(), EvaluationConfig(suite="paper")).table]
    assert not any(label.startswith(("bpda", "projector")) for label in labels)
