"""A threat other than L-infinity: suites, the verdict and what is written of it follow its norm."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import evaluate
from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation import gradient_masking
from dircluster.evaluation.suites import SUITES, AttackSpec, suite

ATTACK = AttackConfig(norm="l2", epsilon=0.5)
NAMES = ("randomized", "purifies", "transfers", "masked")
KINDS = [dict(zip(NAMES, kind, strict=True)) for kind in itertools.product((False, True), repeat=4)]


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_case_of_a_suite_has_the_norm_of_the_threat(name: Any, kind: dict[str, bool]) -> None:
    for spec in suite(name, ATTACK, EvaluationConfig(), **kind):
        assert spec.norm == "l2"
        assert spec.epsilon == (0.0 if spec.attack == "natural" else 0.5)
        if spec.attack in ("pgd", "masked", "bpda", "restored", "mifgsm", "vnifgsm"):
            assert spec.step_size == 2.5 * 0.5 / spec.steps


def test_the_suites_of_an_linf_threat_meet_l2_as_well() -> None:
    kind = {"randomized": True, "purifies": True, "transfers": True, "masked": True}
    specs = suite("rigorous", AttackConfig(), EvaluationConfig(l2_epsilon=0.7), **kind)
    (other,) = [spec for spec in specs if spec.norm == "l2"]
    assert (other.name, other.epsilon, other.steps) == ("l2-pgd200", 0.7, 200)
    assert other.step_size == pytest.approx(0.7 / 4)


def test_the_verdict_of_an_l2_threat() -> None:
    specs = gradient_masking.check_specs(ATTACK, EvaluationConfig(), randomized=True, transfers=True)
    assert [name for name, spec in specs.items() if spec.norm == "linf"] == ["epsilon 1"]  # the whole pixel range
    assert specs["L2 epsilon 1"] == replace(specs["L2 epsilon 0.5"], epsilon=1.0, step_size=2 * 2.5 * 0.5 / 20)
    assert (specs["80 steps"].step_size, specs["20 steps"].step_size) == (2.5 * 0.5 / 80, 2.5 * 0.5 / 20)
    fine = dict.fromkeys(specs, 0.5) | {"natural": 0.9, "random noise": 0.9, "epsilon 1": 0.0, "gradients": 1.0}
    fine |= dict.fromkeys([*gradient_masking.ALIKE, "slope"], 1.0)
    fine |= {"L2 epsilon 0.125": 0.8, "L2 epsilon 0.25": 0.7, "L2 epsilon 1": 0.3, "L2 epsilon 2": 0.1}

    def shares(spec: AttackSpec, changed: dict[str, float]) -> Tensor:
        name = next(name for name, known in specs.items() if known is spec)
        return torch.full((50,), {**fine, **changed}[name])

    assert not [f for f in gradient_masking.checks(specs, lambda spec: shares(spec, {})) if not f.passed]
    rising = gradient_masking.checks(specs, lambda spec: shares(spec, {"L2 epsilon 2": 0.8}))
    assert [f.question for f in rising if not f.passed] == ["Does accuracy fall as the radius grows?"]
    drawn = gradient_masking.curves(specs, lambda spec: shares(spec, {}))["epsilon"]
    assert [x for x, _, _ in drawn] == [0.0, 0.125, 0.25, 0.5, 1.0, 2.0]


def test_a_module_is_judged_under_an_l2_threat() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 3
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    few = EvaluationConfig(steps=3, queries=20, verdict_images=8)
    found = evaluate(module, images, labels, verdict=True, epsilon=2.0, norm="l2", settings=few)
    rows = [(row.attack, row.norm, row.epsilon) for row in found.rows]
    assert rows == [
        ("natural", "l2", 0.0),
        ("pgd3", "l2", 2.0),
        ("pgd3-margin", "l2", 2.0),
        ("malt", "l2", 2.0),
    ]
    assert len(found.verdict) == 16
