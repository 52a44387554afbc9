"""EBM: its objective and chains against a plain reading, replicates, gradients, presets, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import ConfigError, DataConfig, EvaluationConfig, ScalingConfig
from dircluster.defenses.base import Defended
from dircluster.defenses.ebm import DEFENSE, Chains, EbmRecipe, LangevinPurifier
from dircluster.defenses.recipe import Batch
from dircluster.evaluation.victim import VictimModel
from dircluster.models import classifiers
from dircluster.models.energy import langevin
from dircluster.models.noise import counted_normal
from dircluster.presets import preset
from dircluster.presets.ebm import EbmConfig, EbmRun, EnergyConfig
from dircluster.rng import Stream
from dircluster.training.costs import step_operations
from dircluster.training.stages import stages_of

MODEL = EnergyConfig(widths=(4, 6), steps=3, noise=0.05, replicates=2)


def recipe() -> EbmRecipe:
    with rng.seeded_torch_rng(0, "ebm"):
        purifier, chains = LangevinPurifier(MODEL, 1, 8, 8), Chains(20, 1, 8, 8)
    config = EbmConfig(chains=20, steps=3, data_noise=0.1)
    return EbmRecipe(purifier, chains, config).double().train()


def batch_of(made: EbmRecipe, n: int = 6, step: int = 0) -> Batch:
    images = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    stream = Stream(0, 0, step, n, slice(0, n), torch.device("cpu"))
    return made.batch(images, torch.zeros(n, dtype=torch.int64), stream)


def defended(model: EnergyConfig = MODEL) -> Defended:
    with rng.seeded_torch_rng(0, "ebm"):
        purifier = LangevinPurifier(model, 1, 8, 8)
        return Defended(purifier, classifiers.build("small_cnn", DataConfig())).eval()


def some_images(n: int = 3) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))


def test_the_chains_go_on_from_where_they_were() -> None:
    made = recipe()
    before, batch = made.chains.reached.clone(), batch_of(made)
    rows = batch.draws["chains"]
    assert len(rows.unique()) == 6  # no chain twice: its end would be lost
    found = made.attack(batch)
    for place, row in enumerate(rows.tolist()):
        reached = before[row : row + 1].clone()
        for step in range(3):
            asked = reached.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(made.purifier.energy(asked).sum(), asked)
            noise = counted_normal(batch.draws["langevin"][place : place + 1], step, (1, 8, 8))
            reached = reached - slope + 0.05 * noise
        torch.testing.assert_close(made.chains.reached[row : row + 1], reached)
        torch.testing.assert_close(found.attacked[place : place + 1], (reached + 1) / 2)
    untouched = sorted(set(range(20)) - set(rows.tolist()))
    assert torch.equal(made.chains.reached[untouched], before[untouched])
    assert all(p.requires_grad and p.grad is None for p in made.purifier.parameters())


def test_the_loss_is_that_of_the_paper() -> None:
    """In float64, image by image; gradients reach the energy and nothing else."""
    made = recipe()
    batch = made.attack(batch_of(made))
    data = sum(
        made.purifier.energy((2 * x - 1 + 0.1 * noise.double())[None]).item()
        for x, noise in zip(batch.images, batch.draws["data_noise"], strict=True)
    )
    chains = sum(made.purifier.energy(made.chains.reached[row][None]).item() for row in batch.draws["chains"])
    found = made(batch)
    assert found["energy_difference"].item() == pytest.approx((data - chains) / 6, rel=1e-9)
    assert found["loss"].item() == pytest.approx((data - chains) / 6 / (0.05**2 / 2), rel=1e-9)
    found["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in list(made.purifier.parameters())[:-1])
    assert made.updates == (("purifier",),)
    assert made.deployed() is None
    assert "chains.reached" in made.state_dict()  # so that a resumed run goes on with them


def test_a_prediction_is_the_mean_over_the_chains_of_a_row() -> None:
    defense, images = defended(), some_images()
    draws = defense.purifier.draw(torch.Generator().manual_seed(0), 3)
    assert draws is not None
    assert draws.shape == (3, 2)
    with torch.no_grad():
        found = defense.logits(images, draws)
        each = [defense.classifier(defense.purifier(images, draws[:, [i]])) for i in range(2)]
        torch.testing.assert_close(found, (each[0] + each[1]) / 2)
        start = 2 * images - 1
        purified = (langevin(defense.purifier.energy, start, draws[:, 0], 3, 0.05) + 1) / 2
        torch.testing.assert_close(defense.purifier(images, draws), purified)
        assert torch.equal(defense.fixed(3)(images), defense.fixed(3)(images))
        assert not torch.equal(defense.fresh(1)(images), defense.fixed(3)(images))
        assert defense.averaged(4)(images).shape == (3, 10)


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
def test_bpda_is_the_exact_gradient_unless_the_energy_is_smooth(activation: Any) -> None:
    defense, images = defended(replace(MODEL, activation=activation)), some_images()
    victim = VictimModel(defense, "ebm")
    slopes = []
    for model in (victim.model("fixed", 5, images=3), victim.bypassed("fixed", 5, images=3)):
        asked = images.clone().requires_grad_(True)
        logits = model(asked)
        (slope,) = torch.autograd.grad(logits.square().sum(), asked)
        slopes.append((logits.detach(), slope))
    torch.testing.assert_close(slopes[0][0], slopes[1][0])  # the same logits by either
    assert torch.allclose(slopes[0][1], slopes[1][1], rtol=1e-5) == (activation == "leaky_relu")
    if activation == "silu":  # by differences of the whole defense, in float64
        whole = defense.double().fixed(5)
        asked = images.double().requires_grad_(True)
        (slope,) = torch.autograd.grad(whole(asked).square().sum(), asked)
        moved = torch.zeros_like(asked)
        moved[1, 0, 3, 4] = 1e-6
        with torch.no_grad():
            ends = [whole(asked + sign * moved).square().sum().item() for sign in (1, -1)]
        assert slope[1, 0, 3, 4].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_the_published_settings() -> None:
    run = preset("cifar10_ebm")
    assert isinstance(run, EbmRun)
    energy = DEFENSE.build(run, "purifier")
    assert sum(p.numel() for p in energy.parameters()) == 693_569
    target, first, last = stages_of(run)
    batches = 45_000 // run.training.batch_size
    assert (run.training.batch_size, run.target.objective) == (100, "natural")
    assert first.epochs * batches == pytest.approx(125_000, rel=2e-3) == last.epochs * batches
    rates = (first.optimizers["purifier"], last.optimizers["purifier"])
    assert [(one.name, one.lr, one.weight_decay) for one in rates] == [("adamw", 1e-4, 0.0), ("sgd", 2.5e-9, 0.0)]
    assert rates[1].lr == pytest.approx(5e-5 * run.model.noise**2 / 2)
    assert (rates[0].rate(200, 278), rates[1].momentum) == (1e-4, 0.0)
    assert (first.keep, first.augments, target.augments) == ("last", False, True)
    assert (first.stored, last.stored) == (("purifier", "chains"), ("purifier", "classifier"))
    svhn = preset("svhn_ebm")
    assert isinstance(svhn, EbmRun)
    assert (svhn.model.noise, svhn.ebm.data_noise) == (1.75e-2, 3e-2)
    assert svhn.ebm.last_optimizer.lr == pytest.approx(2.5e-5 * svhn.model.noise**2 / 2)
    authors = replace(run, target=replace(run.target, architecture="wrn-28-10"))
    assert run.printed == authors.printed == {"ebm": {"bpda40": 51.43}}
    short = preset("cifar10_ebm_short")
    assert isinstance(short, EbmRun)
    assert not short.printed
    assert short.ebm.epochs * batches == pytest.approx(10_000, rel=2e-2)
    assert [stage.name for stage in stages_of(short)] == ["target", "ebm"]


def test_an_update_costs_what_its_chains_cost() -> None:
    run = preset("cifar10_ebm")
    assert isinstance(run, EbmRun)
    few = [replace(run, ebm=replace(run.ebm, steps=steps)) for steps in (1, 2)]
    one, two = (step_operations(each, "ebm") / 2 / run.training.batch_size for each in few)
    step, update = two - one, 2 * one - two
    assert round(step / 26.05e6, 1) == 2.0  # forward, and backward to the image
    assert 125_000 * 2 * 100 * (100 * step + update) == pytest.approx(1.34e17, rel=0.03)
    short, images = preset("cifar10_ebm_short"), 45_000
    assert isinstance(short, EbmRun)
    one = short.ebm.steps * step + update
    target = step_operations(short, "target") / 2 / short.training.batch_size * short.target.epochs
    assert (f"{one / 1e9:.1f}", f"{one * short.ebm.epochs * images:.1e}") == ("3.3", "3.2e+15")
    assert f"{target * images:.1e}" == "8.2e+15"


def test_the_card_says_what_it_is_and_how_it_was_broken() -> None:
    for name, short in (("cifar10_ebm", False), ("cifar10_ebm_short", True), ("digits_ebm", True)):
        text = DEFENSE.describe(preset(name))
        assert "6.08 %" in text
        assert "2605.06357" in text
        assert ("these are not the published numbers" in text) == short


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: replace(run, model=EnergyConfig(widths=(8,) * 5)), "5 stages, which halve images 4 times"),
        (lambda run: replace(run, model=EnergyConfig(widths=())), "model.widths must be one or more"),
        (lambda run: replace(run, model=EnergyConfig(replicates=0)), "model.replicates must be positive"),
        (lambda run: replace(run, model=EnergyConfig(replicates=10**9)), "model.replicates must be at most 10000"),
        (lambda run: replace(run, model=EnergyConfig(steps=10**9)), "model.steps must be at most 100000"),
        (lambda run: replace(run, ebm=EbmConfig(chains=64)), "ebm.chains must be at least training.batch_size 128"),
        (lambda run: replace(run, scaling=ScalingConfig(workers=2)), "scaling.workers must be 1 for ebm"),
        (lambda run: replace(run, ebm=EbmConfig(data_noise=-1.0)), "ebm.data_noise must be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change(preset("digits_ebm"))


def test_settings_for_evaluation_hold_as_given() -> None:
    assert preset("digits_ebm").evaluation == EvaluationConfig(images=100, eot=2, draws=4)
