"""JATP, our reconstruction: its loss against a plain reading, and samples that are crafted through g on that loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import AttackConfig, ConfigError, DataConfig
from dircluster.defenses.hgd import UNetPurifier
from dircluster.defenses.jatp import DEFENSE, JatpRecipe
from dircluster.defenses.recipe import Batch
from dircluster.models import classifiers
from dircluster.presets import preset
from dircluster.presets.jatp import JatpConfig, JatpRun
from dircluster.rng import Stream

ATTACK = AttackConfig(epsilon=0.1, steps=3)


def recipe(attack: AttackConfig = ATTACK, **config: Any) -> JatpRecipe:
    with rng.seeded_torch_rng(0, "jatp"):
        purifier = UNetPurifier(1, widths=(4, 8), units=(1, 1))
        classifier = classifiers.build("small_cnn", DataConfig())
    return JatpRecipe(purifier, classifier, JatpConfig(**config), attack).double().train()


def batch_of(made: JatpRecipe, n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    stream = Stream(0, 0, 0, n, slice(0, n), torch.device("cpu"))
    return made.batch(images, torch.randint(10, (n,), generator=generator), stream)


def layers(made: JatpRecipe, images: Tensor, count: int | None) -> Tensor:
    network: Any = made.classifier.network
    values = (images - 0.5) / 0.5
    for layer in list(network)[:count]:
        values = layer(values)
    return values.flatten(1)


def cosine(a: list[float], b: list[float]) -> float:
    inner = sum(x * y for x, y in zip(a, b, strict=True))
    return inner / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ({}, 7),
        ({"layer": "map", "similarity": "mse", "pixel_weight": 3.0}, 4),
        ({"layer": "logits", "hard_weight": 1.0}, None),
    ],
)
def test_the_loss(config: dict[str, Any], depth: int | None) -> None:
    made = recipe(**config)
    batch = made.attack(batch_of(made))
    restored = made.purifier(batch.attacked).detach()
    ours, theirs = layers(made, restored, depth).tolist(), layers(made, batch.images, depth).tolist()
    if config.get("similarity") == "mse":
        apart = [
            sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a) for a, b in zip(ours, theirs, strict=True)
        ]
    else:
        apart = [1 - cosine(a, b) for a, b in zip(ours, theirs, strict=True)]
    if "hard_weight" in config:
        chances = layers(made, batch.images, None).softmax(dim=1)
        apart = [s * (1 - chances[i, y].item()) for i, (s, y) in enumerate(zip(apart, batch.labels, strict=True))]
    feature = sum(apart) / len(apart)
    pixel = (restored - batch.images).square().sum().item() / batch.images.numel()
    found = made(batch)
    assert found["feature"].item() == pytest.approx(feature, rel=1e-4)  # in float32, small differences of ones
    assert found["pixel"].item() == pytest.approx(pixel, rel=1e-5)
    assert found["loss"].item() == pytest.approx(feature + config.get("pixel_weight", 1.0) * pixel, rel=1e-4)
    found["loss"].backward()
    assert all(p.grad is not None for p in made.purifier.parameters())
    assert all(p.grad is None for p in made.classifier.parameters())


def test_samples_are_crafted_through_the_denoiser_on_the_similarity() -> None:
    made = recipe(similarity="mse")
    plain = batch_of(made)
    batch = made.attack(plain)
    made.purifier.eval()
    x = (plain.images + 0.1 * (2 * plain.draws["pgd"] - 1)).clamp(0, 1)
    for _ in range(3):
        x = x.detach().requires_grad_(True)
        ours, theirs = layers(made, made.purifier(x), 7), layers(made, plain.images, 7)
        (gradient,) = torch.autograd.grad((ours - theirs.detach()).square().mean(dim=1).sum(), x)
        x = torch.clamp(x + 0.025 * gradient.sign(), plain.images - 0.1, plain.images + 0.1).clamp(0, 1)
    torch.testing.assert_close(batch.attacked, x.detach(), atol=1e-6, rtol=0)
    made.train()
    with torch.no_grad():
        for weight in made.purifier.parameters():
            weight.add_(0.3)
    assert not torch.equal(made.attack(plain).attacked, batch.attacked)


def test_cheaper_samples_start_on_the_features_of_the_target_alone() -> None:
    made = recipe(replace(ATTACK, crafting="target_first"), similarity="mse")
    plain = batch_of(made)
    batch = made.attack(plain)
    made.purifier.eval()
    x = (plain.images + 0.1 * (2 * plain.draws["pgd"] - 1)).clamp(0, 1)
    for step in range(4):
        x = x.detach().requires_grad_(True)
        ours = layers(made, made.purifier(x) if step == 3 else x, 7)
        (gradient,) = torch.autograd.grad((ours - layers(made, plain.images, 7).detach()).square().mean(dim=1).sum(), x)
        x = torch.clamp(x + 0.025 * gradient.sign(), plain.images - 0.1, plain.images + 0.1).clamp(0, 1)
    torch.testing.assert_close(batch.attacked, x.detach(), atol=1e-6, rtol=0)
    assert not recipe(replace(ATTACK, crafting="target_first", pipeline_every=2)).capturable
    fast = replace(preset("digits_jatp"), attack=AttackConfig(crafting="straight_through"))
    (stage,) = (stage for stage in DEFENSE.stages(fast) if stage.name == "jatp")
    assert stage.on_pipeline
    assert stage.passes == 2


def test_a_target_that_does_not_say_its_features_is_refused() -> None:
    target, purifier = nn.Linear(4, 2), UNetPurifier(1, widths=(4, 8), units=(1, 1))
    with pytest.raises(ConfigError, match=r"\(Linear\) does not say .*; use jatp.layer logits"):
        JatpRecipe(purifier, target, JatpConfig(), ATTACK)
    JatpRecipe(purifier, target, JatpConfig(layer="logits"), ATTACK)


def test_the_schedule_and_the_card() -> None:
    run = preset("cifar10_jatp")
    assert isinstance(run, JatpRun)
    rates = [run.jatp.optimizer.rate(epoch, run.jatp.epochs) for epoch in (0, 39.9, 40, 50, 60)]
    assert rates == pytest.approx([1e-3, 1e-3, 3e-4, 9e-5, 2.7e-5])
    assert "our reconstruction; no code, text not available" in " ".join(DEFENSE.describe(run).split())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hard_weight": 2.0}, "jatp.hard_weight must lie in"), ({"pixel_weight": -1.0}, "jatp.pixel_weight must be 0")],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JatpConfig(**change)
