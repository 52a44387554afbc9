"""ME-Net: estimation, samples and losses against a plain reading, presets, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster import rng
from dircluster.config import AttackConfig, ConfigError, DataConfig
from dircluster.defenses.base import Defended
from dircluster.defenses.menet import DEFENSE, MatrixEstimation, MenetRecipe, entry_masks
from dircluster.defenses.recipe import Batch
from dircluster.models import classifiers
from dircluster.presets import preset
from dircluster.presets.menet import EstimationConfig, MenetConfig, MenetRun
from dircluster.rng import Stream
from dircluster.training.costs import step_operations
from dircluster.training.stages import stages_of

ATTACK = AttackConfig(epsilon=0.15, steps=3)


def recipe(adversarial: bool, dtype: torch.dtype = torch.float32) -> MenetRecipe:
    with rng.seeded_torch_rng(0, "menet"):
        classifier = classifiers.build("small_cnn", DataConfig())
    purifier = MatrixEstimation(EstimationConfig(), 1, 8, 8)
    return MenetRecipe(purifier, classifier, MenetConfig(), ATTACK, adversarial=adversarial).to(dtype).train()


def batch_of(made: MenetRecipe, dtype: torch.dtype = torch.float32, n: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 1, 8, 8, generator=generator, dtype=dtype)
    stream = Stream(0, 0, 0, n, slice(0, n), torch.device("cpu"))
    return made.batch(images, torch.randint(10, (n,), generator=generator), stream)


def plain(images: Tensor, mask: Tensor) -> Tensor:
    """USVT as published: one matrix [R|G|B] in [-1, 1], 0.8 of its singular values, divided, cut, in [0, 1] again."""
    made = []
    for image, kept in zip(images.numpy(), mask.numpy(), strict=True):
        matrix = np.concatenate(list(2 * image - 1), axis=1)
        seen = np.concatenate(list(kept), axis=1)
        u, s, v = np.linalg.svd(matrix * seen, full_matrices=False)
        rank = int(0.8 * min(matrix.shape))
        found = (u[:, :rank] * s[:rank]) @ v[:rank] / (seen.sum() / seen.size)
        made.append(np.stack(np.split(np.clip(found, -1, 1), len(image), axis=1)))
    return torch.from_numpy((np.stack(made) + 1) / 2)


def test_the_purifier_is_that_of_the_paper() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    purifier = MatrixEstimation(EstimationConfig(), 3, 32, 32)
    mask = purifier.draw(torch.Generator().manual_seed(1), 2)
    assert mask.shape == images.shape  # an entry is a pixel of one channel
    assert not torch.equal(mask[:, 0], mask[:, 1])
    torch.testing.assert_close(purifier(images, mask), plain(images, mask), atol=1e-10, rtol=0)
    torch.testing.assert_close(purifier(images.float(), mask), plain(images, mask).float(), atol=5e-6, rtol=0)
    assert not list(purifier.parameters())
    (seen,) = purifier.visible(images, mask)
    assert torch.equal(seen[mask], images[mask])
    assert bool((seen[~mask] == 0.5).all())


def test_the_rank_is_a_share_of_the_singular_values_of_a_gray_image_taller_than_wide() -> None:
    images = torch.rand(2, 1, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    purifier = MatrixEstimation(EstimationConfig(), 1, 16, 8)
    mask = purifier.draw(torch.Generator().manual_seed(1), 2)
    torch.testing.assert_close(purifier(images, mask), plain(images, mask), atol=1e-10, rtol=0)


def test_what_autograd_follows_holds_mask_and_projector() -> None:
    """U U^T (M o dX) / p where nothing is cut: what a small change does while the projector stays."""
    images = 0.45 + 0.1 * torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    purifier = MatrixEstimation(EstimationConfig(), 1, 8, 8)
    mask = purifier.draw(torch.Generator().manual_seed(1), 1)
    asked = images.clone().requires_grad_(True)
    found = purifier(asked, mask)
    assert bool(((found > 0) & (found < 1)).all())
    towards = torch.rand(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (slope,) = torch.autograd.grad((found * towards).sum(), asked)
    u = np.linalg.svd(((2 * images - 1) * mask)[0, 0].numpy())[0][:, :6]
    expected = mask[0, 0].numpy() * (u @ u.T @ towards[0, 0].numpy()) / mask.double().mean().item()
    np.testing.assert_allclose(slope[0, 0].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_loss_is_cross_entropy_on_estimated_images(adversarial: bool) -> None:
    made = recipe(adversarial, torch.float64)
    batch = made.attack(batch_of(made, torch.float64))
    images = batch.attacked if adversarial else batch.images
    chances = torch.softmax(made.classifier(plain(images, batch.draws["masks"])), dim=1)
    expected = sum(-torch.log(chances[i, label]).item() for i, label in enumerate(batch.labels)) / 4
    found = made(batch)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-6)
    found["loss"].backward()
    assert all(p.grad is not None for p in made.classifier.parameters())


def test_samples_are_crafted_by_bpda_through_a_new_mask_at_each_step() -> None:
    made = recipe(True)
    batch = batch_of(made)
    assert {"masks", "masks/1", "masks/2", "masks/3", "pgd"} == set(batch.draws)
    epsilon, reached = ATTACK.epsilon, batch.images + ATTACK.epsilon * (2 * batch.draws["pgd"] - 1)
    reached = reached.clamp(0, 1)
    for step in (1, 2, 3):
        with torch.no_grad():
            estimated = made.purifier(reached, batch.draws[f"masks/{step}"])
        estimated.requires_grad_(True)
        loss = F.cross_entropy(made.classifier(estimated), batch.labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, estimated)
        reached = reached + ATTACK.step * slope.sign()
        reached = torch.clamp(reached, batch.images - epsilon, batch.images + epsilon).clamp(0, 1)
    torch.testing.assert_close(made.attack(batch).attacked, reached)
    assert made.classifier.training
    natural = recipe(False)
    assert set(batch_of(natural).draws) == {"masks"}
    assert natural.attack(batch_of(natural)).adversarial is None


def test_each_image_has_a_chance_of_its_own_while_training() -> None:
    shares = entry_masks(torch.Generator().manual_seed(0), 200, (3, 32, 32), 0.4, 0.6).double().mean(dim=(1, 2, 3))
    assert 0.38 < float(shares.min()) < 0.42
    assert 0.58 < float(shares.max()) < 0.62
    assert float(shares.std()) == pytest.approx(0.2 / 12**0.5, abs=0.01)
    fixed = entry_masks(torch.Generator().manual_seed(0), 200, (3, 32, 32), 0.5, 0.5).double().mean(dim=(1, 2, 3))
    assert float((fixed - 0.5).abs().max()) < 0.04


def test_the_presets_settings() -> None:
    natural, attacked = preset("cifar10_menet"), preset("cifar10_menet_a")
    assert isinstance(natural, MenetRun)
    assert isinstance(attacked, MenetRun)
    assert (natural.target.epochs, natural.target.optimizer.milestones) == (200, (100, 150))
    assert (attacked.target.epochs, attacked.target.optimizer.milestones) == (100, (50, 75))
    assert (attacked.attack.steps, attacked.attack.step, attacked.training.batch_size) == (7, 2 / 255, 256)
    assert (natural.printed, attacked.printed) == (
        {"menet": {"bpda40": 15.26}},
        {"menet": {"bpda40": 32.10}},
    )
    assert not replace(natural, attack=AttackConfig(epsilon=4 / 255)).printed
    for run, keep in ((natural, "last"), (attacked, "best")):
        (stage,) = stages_of(run)
        assert (stage.name, stage.keep) == ("menet", keep)
    macs = step_operations(attacked, "menet") / 2 / attacked.training.batch_size
    assert round(macs / 1e9, 1) == 9.4  # an image's: seven steps of crafting, one update
    assert sum(p.numel() for p in DEFENSE.build(natural, "classifier").parameters()) == 11_173_962


def test_the_card_says_how_it_was_broken() -> None:
    for name in ("cifar10_menet", "cifar10_menet_a"):
        text = DEFENSE.describe(preset(name))
        assert "26.0 %" in text
        assert "11_menet" in text
        assert ("ME-Net-A (Yang" in text) == name.endswith("_a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: replace(run, target=replace(run.target, objective="trades")), "target.objective must be natural"),
        (lambda run: replace(run, target=replace(run.target, uri="x.safetensors")), "target.uri has no use for menet"),
        (lambda run: replace(run, model=EstimationConfig(rank=0.1)), "model.rank 0.1 leaves none of the 8"),
        (lambda run: replace(run, model=EstimationConfig(kept=0.0)), r"model.kept must lie in \(0, 1\]"),
        (lambda run: replace(run, model=EstimationConfig(iterations=0)), "model.iterations must be positive"),
        (lambda run: replace(run, menet=MenetConfig(lowest=0.7)), "menet.lowest and menet.highest must rise"),
    ],
)
def test_what_cannot_be_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change(preset("digits_menet"))


@pytest.mark.parametrize("method", ["usvt", "soft_impute", "nuclear_norm"])
def test_each_method_gives_gradients_through_the_whole_defense(method: Any) -> None:
    made = recipe(False)
    purifier = MatrixEstimation(EstimationConfig(method=method, iterations=20), 1, 8, 8)
    defense = Defended(purifier, made.classifier).eval().fixed(0)
    asked = batch_of(made).images.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(defense(asked).sum(), asked)
    assert slope.isfinite().all()
    assert bool((slope != 0).flatten(1).any(dim=1).all())
