"""The plain step that the benchmark compares with computes what DIR's step computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from dircluster.config import ConfigError
from dircluster.defenses import dir as dir_defense
from dircluster.defenses.dir import DirRecipe, MaskedPurifier
from dircluster.defenses.plain_dir import PlainDirRecipe, compared
from dircluster.defenses.recipe import Batch
from dircluster.models import classifiers
from dircluster.presets import preset
from dircluster.presets.dir import DirRun, with_fast_crafting, with_paper_crafting
from dircluster.training.stages import stages_of


def test_it_is_the_same_maths(make_batch: Callable[..., Batch]) -> None:
    run = preset("digits_smoke")
    assert isinstance(run, DirRun)
    run = with_paper_crafting(run)
    torch.manual_seed(0)
    denoiser = MaskedPurifier(run.model, run.masking, 1, 8, 8)
    classifier = classifiers.build("small_cnn", run.data)
    found = {}
    for kind in (DirRecipe, PlainDirRecipe):
        recipe = kind(denoiser, classifier, run.dir, run.attack).train()
        batch = recipe.attack(make_batch(recipe))
        terms = recipe(batch)
        denoiser.zero_grad()
        terms["loss"].backward()
        gradient = torch.cat([p.grad.flatten() for p in denoiser.parameters()])
        found[kind] = (batch.attacked, {name: value.item() for name, value in terms.items()}, gradient)
    ours, plain = found.values()
    assert (ours[0] != plain[0]).float().mean() < 0.02  # a sign that rounding decides
    assert plain[1] == pytest.approx(ours[1], rel=1e-3)
    torch.testing.assert_close(plain[2], ours[2], rtol=0.05, atol=1e-3)


def test_crafting_leaves_the_gradients_of_other_micro_batches(make_batch: Callable[..., Batch]) -> None:
    run = preset("digits_smoke")
    assert isinstance(run, DirRun)
    denoiser = MaskedPurifier(run.model, run.masking, 1, 8, 8)
    recipe = PlainDirRecipe(denoiser, classifiers.build("small_cnn", run.data), run.dir, run.attack).train()
    recipe.attack(make_batch(recipe))
    assert all(p.grad is None for p in recipe.parameters())
    for p in denoiser.parameters():
        p.grad = torch.ones_like(p)
    recipe.attack(make_batch(recipe))
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in denoiser.parameters())


def test_it_is_neither_captured_nor_compiled() -> None:
    """It drops gradients on its way: a recording of it wrote to memory that others held by then."""
    run = preset("cifar10_smoke")
    assert isinstance(run, DirRun)
    asked = dataclasses.replace(run, training=dataclasses.replace(run.training, capture="on", compile="on"))
    variants = compared(asked)
    for name, (found, recipe) in variants.items():
        plain = name == "plain"
        assert (found.training.capture, found.training.compile) == (("off",) * 2 if plain else ("on",) * 2)
        networks = {n: dir_defense.DEFENSE.build(run, n) for n in ("classifier", "denoiser")}
        made = (recipe or stages_of(found)[-1].recipe)(networks)
        assert made.capturable is not plain


@pytest.mark.parametrize("name", ["cifar10_joint_smoke", "l2"])
def test_what_it_does_not_compute_is_refused(name: str) -> None:
    run = preset("digits_smoke" if name == "l2" else name)
    assert isinstance(run, DirRun)
    if name == "l2":
        run = dataclasses.replace(run, attack=dataclasses.replace(run.attack, norm="l2", epsilon=1.0))
    with pytest.raises(ConfigError, match="--compare is of Algorithm 1"):
        compared(run)


def test_fast_crafting_and_the_papers_undo_one_another() -> None:
    run = preset("cifar10")
    assert isinstance(run, DirRun)
    assert with_paper_crafting(run) == run
    fast = with_fast_crafting(run)
    assert (fast.attack.crafting, fast.attack.step, fast.dir.perturb_steps) == ("target_first", 4 / 255, 2)
    assert with_paper_crafting(fast) == run
