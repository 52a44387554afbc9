"""Training under an L2 threat: every recipe crafts within its ball, and Eq. 4 within the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import AttackConfig, DataConfig, TargetConfig
from dircluster.defenses.dir import DirRecipe, MaskedPurifier, PretrainRecipe
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.target import TargetRecipe
from dircluster.models.classifiers import build
from dircluster.presets.dir import DirConfig, MaskingConfig
from tests.unit.defenses.conftest import TINY

ATTACK = AttackConfig(norm="l2", epsilon=1.2, steps=3)
TARGETS = {
    "at": TargetConfig(architecture="small_cnn", objective="at"),
    "trades": TargetConfig(architecture="small_cnn", objective="trades"),
    "mart": TargetConfig(architecture="small_cnn", objective="mart"),
}


def recipe(name: str) -> Recipe:
    with rng.seeded_torch_rng(0, "parts"):
        denoiser, classifier = MaskedPurifier(TINY, MaskingConfig(), 1, 8, 8), build("small_cnn", DataConfig())
    if name == "dir":
        return DirRecipe(denoiser, classifier, DirConfig(perturb_steps=4), ATTACK)
    if name == "pretrain":
        return PretrainRecipe(denoiser, classifier, ATTACK)
    return TargetRecipe(classifier, TARGETS[name], ATTACK)


def lengths(moved: Tensor) -> Tensor:
    return moved.flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", [*TARGETS, "pretrain", "dir"])
def test_samples_lie_in_the_ball_and_use_it(name: str, make_batch: Callable[..., Batch]) -> None:
    made = recipe(name)
    batch = made.attack(make_batch(made))
    assert batch.adversarial is not None
    moved = batch.adversarial - batch.images
    assert lengths(moved).max() <= 1.2 + 1e-5
    assert lengths(moved).min() > 0.5
    assert moved.abs().amax(dim=(1, 2, 3)).max() > 0.2  # a few pixels move far, which LInf would not
    assert batch.adversarial.min() >= 0
    assert batch.adversarial.max() <= 1
    terms = made(batch)
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"])


def test_the_perturbation_of_dir_lies_in_the_ball(make_batch: Callable[..., Batch]) -> None:
    made = recipe("dir")
    assert isinstance(made, DirRecipe)
    batch = made.attack(make_batch(made))
    assert batch.adversarial is not None
    restored = made.denoiser(batch.adversarial, batch.draws["masks"]).detach()
    delta = made.perturb(batch, restored, made.classifier(restored).detach())
    assert lengths(delta).max() <= 1.2 + 1e-5
    assert lengths(delta).min() > 1.0  # 4 steps of 2.5 * 1.2 / 4 reach the surface
