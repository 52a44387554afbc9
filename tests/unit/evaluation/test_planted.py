"""Each planted fault is flagged by the check that names it, honest modules by none. Rows are marked without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster import rng
from dircluster.attacks.apgd import malt
from dircluster.attacks.autoattack import autoattack
from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import LInf
from dircluster.config import ConfigError, DataConfig, EvaluationConfig
from dircluster.data.sources import load
from dircluster.evaluation.session import EvaluationReport, evaluate
from tests.unit.evaluation.conftest import EPSILON
from tests.unit.evaluation.planted import FAULTS, HONEST, around
from tests.unit.evaluation.planted_later import LATER_FAULTS, LATER_HONEST, REFUSED

SETTINGS = EvaluationConfig(images=64, queries=300, steps=5, eot=4, draws=3, verdict_images=64)


def quick_and_slow(names: Iterable[str]) -> list[ParameterSet]:
    """One fault a question, and the honest module that luck could flag; the others are for make proofs."""
    core = {question: name for name, (_, question) in reversed((LATER_FAULTS | FAULTS).items())}
    quick = {*core.values(), "one answer in ten is wrong"}
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def perceptron() -> nn.Module:
    """One of 64 units, trained against PGD-3 for a second."""
    train = load(DataConfig(), 0).train
    with rng.seeded_torch_rng(0, "tests/weights"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, draws = torch.optim.Adam(model.parameters(), 5e-3), rng.generator(0, "tests/training")
    images, labels = train.pixels(), train.labels
    for _ in range(12):
        for rows in torch.randperm(len(labels), generator=draws).split(64):
            x, y = images[rows], labels[rows]
            found = pgd(model, x, y, LInf(EPSILON), 3, EPSILON / 2, torch.rand(x.shape, generator=draws))
            optimizer.zero_grad()
            F.cross_entropy(model(found), y).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return perceptron()


def judged(module: nn.Module, digits: tuple[Tensor, Tensor], verdict: bool = True) -> EvaluationReport:
    return evaluate(module, *digits, verdict=verdict, epsilon=EPSILON, step_size=EPSILON / 2, settings=SETTINGS)


@pytest.mark.parametrize("name", quick_and_slow(FAULTS | LATER_FAULTS))
def test_a_planted_fault_is_flagged_by_its_name(small: nn.Module, digits: tuple[Tensor, Tensor], name: str) -> None:
    made, question = (FAULTS | LATER_FAULTS)[name]
    if question == REFUSED:
        with pytest.raises(ConfigError, match=REFUSED):
            judged(made(small), digits)
        return
    found = judged(made(small), digits)
    assert question in {flag.question for flag in found.flags}, [f"{f.question} {f.answer}" for f in found.verdict]


@pytest.mark.parametrize("name", quick_and_slow(HONEST | LATER_HONEST))
def test_an_honest_module_is_not_flagged(small: nn.Module, digits: tuple[Tensor, Tensor], name: str) -> None:
    found = judged((HONEST | LATER_HONEST)[name](small), digits)
    assert [f"{flag.question} {flag.answer}" for flag in found.flags] == []
    assert [str(mark) for row in found.rows for mark in row.marks] == []


@pytest.mark.parametrize(
    ("name", "kind", "share"),
    [
        ("a detached input", "gradient", 1.0),
        ("a detached leaf", "gradient", 1.0),
        ("integer logits", "gradient", 1.0),
        ("a gradient of NaN", "gradient", 1.0),
        ("a gradient of 1e-40", "gradient", 1.0),
        ("a gradient at some images", "gradient", 7 / 64),
        ("a flipped gradient", "ascent", None),
        ("a random gradient", "ascent", None),
        ("the nearest known image, straight through", "slope", 1.0),
        ("NaN under attack", "finite", None),
    ],
)
def test_a_row_is_marked_without_a_verdict(
    small: nn.Module, digits: tuple[Tensor, Tensor], name: str, kind: str, share: float | None
) -> None:
    found = judged((FAULTS | LATER_FAULTS)[name][0](small), digits, verdict=False)
    marks = {mark.kind: mark for row in found.rows if row.attack == "pgd5" for mark in row.marks}
    assert kind in marks
    assert share is None or marks[kind].share == pytest.approx(share)
    assert str(marks[kind]) in str(found)
    assert found.rows[0].attack == "natural"
    assert found.rows[0].marks == ()


FLIPPED = "a flipped gradient"
MISLED = {
    FLIPPED: FAULTS[FLIPPED][0],
    "a random gradient": FAULTS["a random gradient"][0],
    "a flipped gradient behind noise": lambda h: Noisy(FAULTS[FLIPPED][0](h)),
}


class Noisy(nn.Module):
    """A random module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images + 0.02 * torch.randn_like(images))
        return logits


@pytest.mark.parametrize("name", MISLED)
@pytest.mark.parametrize("suite", ["quick", "rigorous"])
def test_all_rows_that_follow_a_misleading_gradient_are_marked(
    small: nn.Module, digits: tuple[Tensor, Tensor], name: str, suite: str
) -> None:
    """Which of them looks at the gradient itself does not matter: the lowest of them is what a reader takes away."""
    settings = dataclasses.replace(SETTINGS, resubmissions=2, votes=3)
    found = evaluate(MISLED[name](small), *digits, suite, epsilon=EPSILON, settings=settings, step_size=EPSILON / 2)
    rows = [row for row in found.rows if row.epsilon and not row.attack.startswith(("noise", "square"))]
    assert {row.attack.partition("-")[0] for row in rows} >= {"pgd5", "malt"}
    assert [row.attack for row in rows if not row.marks] == []
    assert not any(row.marks for row in found.rows if row not in rows)
    shown = next(row for row in rows if row.attack == "malt").marks[0]
    assert shown.seen_in.startswith("pgd5")
    assert str(shown).startswith(f"in {shown.seen_in}: loss ")


@pytest.mark.parametrize("name", ["one answer in ten is wrong", "noise on the input"])
def test_an_honest_random_module_has_no_mark_under_the_hardest_suite(
    small: nn.Module, digits: tuple[Tensor, Tensor], name: str
) -> None:
    found = evaluate(HONEST[name](small), *digits, "rigorous", epsilon=EPSILON, settings=SETTINGS)
    assert [(row.attack, str(mark)) for row in found.rows for mark in row.marks] == []


def test_logits_that_are_no_numbers_are_wrong(small: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:32], torch.zeros(32).long()
    broken = torch.arange(32) % 2 == 1

    def some(h: nn.Module, x: Tensor) -> Tensor:
        logits = 5 * torch.eye(10)[0].expand(len(x), -1) + 0 * h(x)
        return torch.where(broken[:, None] if len(x) == 32 else torch.tensor(False), torch.nan, logits)

    row = judged(around(some)(small), (images, labels), verdict=False).rows[0]
    assert (row.attack, row.correct, row.judged) == ("natural", 16, 32)
    assert [(mark.kind, mark.share) for mark in row.marks] == [("finite", 0.5)]


def test_an_attack_inside_inference_mode_says_so(small: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    attacks = (
        lambda: pgd(small, *digits, LInf(EPSILON), 2, EPSILON / 2),
        lambda: malt(small, *digits, LInf(EPSILON), 2, 0),
        lambda: autoattack(small, *digits, LInf(EPSILON), "standard", 0),
        lambda: autoattack(small, *digits, LInf(EPSILON), "rand", 0, eot=2),
    )
    for attack in attacks:
        with torch.inference_mode(), pytest.raises(ConfigError, match=r"use torch.no_grad\(\)"):
            attack()
