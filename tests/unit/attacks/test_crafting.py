"""Training samples against a pipeline, each way of crafting them against a plain float64 reading of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.crafting import craft
from dircluster.attacks.gradient import cross_entropy
from dircluster.config import AttackConfig, ConfigError
from dircluster.presets import preset
from dircluster.presets.dir import DirRun

DIM, CLASSES, N, EPSILON, STEP = 12, 4, 5, 0.1, 0.05
WEIGHT = torch.randn(CLASSES, DIM, generator=rng.generator(0, "w"), dtype=torch.float64)
MIX = torch.randn(DIM, DIM, generator=rng.generator(0, "g"), dtype=torch.float64)
IMAGES = torch.rand(N, 3, 2, 2, generator=rng.generator(0, "x"), dtype=torch.float64)
UNIFORM = torch.rand(IMAGES.shape, generator=rng.generator(0, "u"), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0])


@dataclass
class Pipeline:
    """g mixes the pixels, h is linear; how often each ran, and how often g with a gradient."""

    ran: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("g", "g with a gradient", "h"), 0))

    def purify(self, images: Tensor) -> Tensor:
        self.ran["g"] += 1
        self.ran["g with a gradient"] += torch.is_grad_enabled()
        return (images.flatten(1) @ MIX.T).view_as(images)

    def classify(self, images: Tensor) -> Tensor:
        self.ran["h"] += 1
        return images.flatten(1) @ WEIGHT.T


def on_target(x: Tensor, label: int) -> Tensor:
    """d/dx of -log softmax(W x)_y: W^T (p - e_y)."""
    p = torch.softmax(WEIGHT @ x, 0)
    p[label] -= 1
    return WEIGHT.T @ p


def on_pipeline(x: Tensor, label: int) -> Tensor:
    return MIX.T @ on_target(MIX @ x, label)


def past_purifier(x: Tensor, label: int) -> Tensor:
    """The gradient at the purified image, taken for one at the image."""
    return on_target(MIX @ x, label)


def ball(x: Tensor, image: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, image - EPSILON), image + EPSILON).clamp(0, 1)


def plain(gradients: list[Any]) -> Tensor:
    found = []
    for image, uniform, label in zip(IMAGES.flatten(1), UNIFORM.flatten(1), LABELS.tolist(), strict=True):
        x = ball(image + EPSILON * (2 * uniform - 1), image)
        for gradient in gradients:
            x = ball(x + STEP * gradient(x, label).sign(), image)
        found.append(x)
    return torch.stack(found).view_as(IMAGES)


def attack(**settings: Any) -> AttackConfig:
    return AttackConfig(epsilon=EPSILON, training_step_size=STEP, steps=3, **settings)


def crafted(config: AttackConfig, number: int = 0) -> tuple[Tensor, dict[str, int]]:
    pipeline = Pipeline()
    objective = cross_entropy(pipeline.classify, LABELS)
    return craft(pipeline.purify, objective, IMAGES, config, UNIFORM, number), pipeline.ran


@pytest.mark.parametrize(
    ("settings", "number", "gradients", "ran"),
    [
        ({}, 0, [on_pipeline] * 3, (3, 3, 3)),
        ({"crafting": "target_first"}, 0, [on_target] * 3 + [on_pipeline], (1, 1, 4)),
        ({"crafting": "target_first", "pipeline_steps": 2}, 5, [on_target] * 3 + [on_pipeline] * 2, (2, 2, 5)),
        ({"crafting": "straight_through"}, 0, [on_target] * 3 + [past_purifier], (1, 0, 4)),
        ({"crafting": "target_first", "pipeline_every": 3}, 6, [on_target] * 3 + [on_pipeline], (1, 1, 4)),
        ({"crafting": "target_first", "pipeline_every": 3}, 7, [on_target] * 3 + [past_purifier], (1, 0, 4)),
    ],
)
def test_it_is_its_definition(
    settings: dict[str, Any], number: int, gradients: list[Any], ran: tuple[int, int, int]
) -> None:
    config = attack(**settings)
    found, counts = crafted(config, number)
    torch.testing.assert_close(found, plain(gradients))
    assert tuple(counts.values()) == ran
    assert counts["g"] == config.pipeline_gradients
    assert not found.requires_grad


def test_n_fgsm_is_one_step_from_wide_noise_and_stays_where_it_lands() -> None:
    found, counts = crafted(attack(crafting="n_fgsm"))
    expected = []
    for image, uniform, label in zip(IMAGES.flatten(1), UNIFORM.flatten(1), LABELS.tolist(), strict=True):
        start = (image + 2 * EPSILON * (2 * uniform - 1)).clamp(0, 1)
        expected.append((start + EPSILON * on_pipeline(start, label).sign()).clamp(0, 1))
    torch.testing.assert_close(found, torch.stack(expected).view_as(IMAGES))
    assert (found - IMAGES).abs().max() > 1.5 * EPSILON
    assert tuple(counts.values()) == (1, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_steps": 0}, "attack.pipeline_steps must be positive, got 0"),
        ({"pipeline_every": 0}, "attack.pipeline_every must be positive, got 0"),
        ({"pipeline_every": 2}, "attack.pipeline_every is for attack.crafting target_first, not pgd"),
        (
            {"training_step_size": 2.0},
            r"attack.training_step_size must lie in \(0, 1\), or be positive for l2, got 2.0",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackConfig(**settings)


def test_a_step_of_the_perturbation_beyond_all_pixels_is_refused() -> None:
    run = preset("digits")
    assert isinstance(run, DirRun)
    knobs = replace(run.dir, perturb_step_size=2.0)
    with pytest.raises(
        ConfigError, match=r"dir.perturb_step_size must lie in \(0, 1\), or be positive for l2, got 2.0"
    ):
        replace(run, dir=knobs)
    assert replace(run, attack=AttackConfig(epsilon=2.0, norm="l2"), dir=knobs).dir == knobs


def test_a_defense_that_crafts_on_its_target_alone_takes_pgd_alone() -> None:
    run = preset("digits_hgd")
    with pytest.raises(ConfigError, match=r"attack.crafting target_first needs a defense .* pipeline; hgd takes pgd"):
        type(run)(attack=AttackConfig(crafting="target_first"))
