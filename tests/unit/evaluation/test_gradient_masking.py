"""The verdict: an honest model passes every row, defenses that cheat are flagged by the rows made for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation.gradient_masking import check_specs
from dircluster.evaluation.session import EvaluationReport, evaluate
from tests.unit.evaluation.conftest import EPSILON

SETTINGS = EvaluationConfig(queries=1000, steps=20, eot=4, draws=3, verdict_images=64)


def judged(module: nn.Module, digits: tuple[Tensor, Tensor]) -> EvaluationReport:
    return evaluate(module, *digits, "quick", verdict=True, epsilon=EPSILON, settings=SETTINGS)


class Quantized(nn.Module):
    """Rounds its input to five levels: a gradient that is zero everywhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.inner((images * 4).round() / 4)
        return made


class Huge(Quantized):
    """Logits so large that cross-entropy is exactly zero in float32."""

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = 1e4 * self.inner(images)
        return made


class Noisy(Quantized):
    """Noise on its input, drawn again at each pass, and wide enough to hide where the attacker must go."""

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.inner(images + 0.4 * torch.randn_like(images))
        return made


class Detached(nn.Module):
    """A purifier (a blur) through which no gradient passes, before a classifier."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def restore(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return 0.9 * images + 0.1 * nn.functional.avg_pool2d(images, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.classifier(self.restore(images))
        return made


def test_square_asks_at_least_once() -> None:
    few = EvaluationConfig(queries=4)  # a fifth of them is none, and compares with nothing
    asked = check_specs(AttackConfig(), few, randomized=False, transfers=False)["square"]
    assert asked.steps == 1


@pytest.mark.long
def test_an_honest_model_passes_every_row(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    found = judged(at_model, digits)
    assert len(found.verdict) == 16
    assert found.flags == []
    natural, robust, *_ = (row.accuracy for row in found.rows)
    assert [row.marks for row in found.rows] == [()] * 4
    assert natural > 0.9 > robust > 0.3


@pytest.mark.slow  # with few images and steps these and more are in test_planted
@pytest.mark.parametrize(
    ("cheat", "questions"),
    [
        (Quantized, {"Do all images have a gradient?", "Does a radius of 1 leave nothing?"}),
        (Huge, {"Do all images have a gradient?"}),
        (Noisy, {"Does robustness outlive its randomness?"}),
        (
            Detached,
            {"Do all images have a gradient?", "Is the white box no weaker than Square, which sees no gradient?"},
        ),
    ],
)
def test_a_cheat_is_flagged(
    at_model: nn.Module, digits: tuple[Tensor, Tensor], cheat: type[nn.Module], questions: set[str]
) -> None:
    found = judged(cheat(at_model), digits)
    assert questions <= {flag.question for flag in found.flags}, [f"{f.question} {f.answer}" for f in found.verdict]
