"""What a module is asked on images that nobody attacks, on one too small to train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dircluster import rng
from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation import gradient_masking
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.marks import Seen
from dircluster.evaluation.probes import PROBES, Question
from dircluster.evaluation.victim import VictimModel
from tests.unit.evaluation.planted import FAULTS, GRADIENT
from tests.unit.evaluation.planted_later import LATER_FAULTS, LATER_HONEST

IMAGES = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def random_net() -> nn.Sequential:
    with rng.seeded_torch_rng(0, "tests/weights"):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).eval()


def passed(probe: str, module: nn.Module) -> float:
    """The share of images that pass."""
    with torch.no_grad():
        labels = module(IMAGES).argmax(dim=1)
        question = Question(VictimModel(module, "m"), "none", 0, 0.15, 1, 256)
        return PROBES[probe](question, IMAGES, labels).double().mean().item()


@pytest.mark.parametrize(
    ("probe", "fault"),
    [
        ("slope", "a gradient at every other pixel"),
        ("slope", "a gradient drowned in noise"),
        ("slope", "one of two branches is detached"),
        ("slope", "noise that the image seeds"),
        ("slope", "a gradient of 1e-24"),
        ("numbers", "other answers in batches of 10 to 40"),
        ("numbers", "one image differs"),
        ("repeats", "the last answer is kept"),
    ],
)
def test_a_fault_fails_its_probe(random_net: nn.Sequential, probe: str, fault: str) -> None:
    made, _ = (FAULTS | LATER_FAULTS)[fault]
    assert passed(probe, made(random_net)) < (0.5 if probe == "slope" else 1)


@pytest.mark.parametrize("probe", ["slope", "numbers", "repeats"])
def test_honest_modules_pass(random_net: nn.Sequential, probe: str) -> None:
    honest = [made(random_net) for name, made in LATER_HONEST.items() if "dropped" not in name]
    least = 0.95 if probe == "slope" else 1.0  # the margin has a kink where the runner-up changes
    assert min(passed(probe, module) for module in (random_net, *honest)) >= least


def test_a_gradient_that_attacks_lose_is_none() -> None:
    specs = gradient_masking.check_specs(AttackConfig(), EvaluationConfig(), randomized=False, transfers=False)

    def question(lost: int) -> bool | None:
        def met(spec: AttackSpec) -> Seen:
            return Seen({"gradient": (lost if spec == specs["margin loss"] else 0, 100)})

        found = gradient_masking.checks(specs, lambda spec: torch.ones(100).double(), met)
        return next(check.passed for check in found if check.question == GRADIENT)

    assert (question(1), question(2)) == (True, False)
