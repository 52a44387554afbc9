"""The gauge of catastrophic overfitting: a training attack that the model defeats, while PGD-20 does not fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import AttackConfig, RunConfig
from dircluster.data.loader import Loader
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.defenses.recipe import Batch
from dircluster.defenses.stage import Stage
from dircluster.defenses.target import TargetRecipe
from dircluster.presets import PRESETS, preset
from dircluster.presets.dir import DirRun
from dircluster.training import stages
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.protocols import NoRecord
from dircluster.training.trainer import Trainer
from dircluster.training.validation import held_out_accuracy, overfitting
from tests.conftest import ALONE
from tests.unit.training.conftest import Hears


class Harmless(TargetRecipe):
    """Its attack finds nothing, as one does whose model has learned to hide from it."""

    def attack(self, batch: Batch) -> Batch:
        return dataclasses.replace(batch, adversarial=batch.images)


class Record(NoRecord):
    def __init__(self) -> None:
        self.points: dict[str, float] = {}

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.points |= values


@pytest.fixture
def run() -> RunConfig:
    """Real digits under a radius at which the nearest mean digit is often another."""
    run = preset("digits")
    return dataclasses.replace(run, attack=AttackConfig(epsilon=0.15, steps=10))


@pytest.fixture
def classifier(run: RunConfig) -> nn.Module:
    """The nearest mean digit."""
    train = load(run.data, run.seed).train
    assert isinstance(train, Split)
    images, labels = train.pixels(slice(None)).flatten(1), train.labels
    means = torch.stack([images[labels == label].mean(dim=0) for label in range(10)])
    linear = nn.Linear(64, 10)
    linear.load_state_dict({"weight": 10 * means, "bias": -5 * means.square().sum(dim=1)})
    return nn.Sequential(nn.Flatten(), linear)


def gap(recipe: TargetRecipe, run: RunConfig) -> float:
    return overfitting(recipe, recipe.deployed(), load(run.data, run.seed).held_out, run, ALONE)


def test_it_is_small_where_the_training_attack_is_strong(classifier: nn.Module, run: RunConfig) -> None:
    assert abs(gap(TargetRecipe(classifier, run.target, run.attack), run)) < 0.03


def test_it_is_what_pgd_takes_where_the_training_attack_takes_nothing(classifier: nn.Module, run: RunConfig) -> None:
    training = dataclasses.replace(run.training, select_images=128, select_steps=20)
    again = dataclasses.replace(run, training=training)
    natural, robust = held_out_accuracy(classifier, load(run.data, run.seed).held_out, again, ALONE)
    assert natural - robust > 0.3
    assert gap(Harmless(classifier, run.target, run.attack), run) == pytest.approx(natural - robust)


@pytest.mark.parametrize("system", ["digits_hgd_a_smoke", "digits_apegan_a_smoke"])
def test_images_that_stay_natural_are_attacked_in_it_too(system: str) -> None:
    found = preset(system)
    recipe = stages.stages_of(found)[-1].recipe(stages.Networks(found, ALONE))
    attack, moved = recipe.attack, list[Tensor]()

    def seen(batch: Batch) -> Batch:
        made = attack(batch)
        moved.append((made.attacked != batch.images).flatten(1).any(dim=1))
        assert batch.number % 4 != 0  # not by the steps that every 4th batch would get
        return made

    recipe.attack = seen  # type: ignore[method-assign]
    deployed = recipe.deployed()
    assert deployed is not None
    assert recipe.attacks_deployed
    overfitting(recipe, deployed, load(found.data, found.seed).held_out, found, ALONE, 16)
    assert torch.cat(moved).all()
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    seen(replace(recipe.batch(images, labels, rng.Stream(0, 0, 0, 16, slice(0, 16), ALONE.device)), number=1))
    assert not moved[-1].all()  # in training some stay


PIPELINE = ("dir", "jatp", "hgd_a", "apegan_a", "nrp_a", "menet_a")
"""Defenses whose last stage crafts on the whole pipeline, if need be."""


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("digits") and name.endswith("_smoke")])
def test_every_recipe_that_crafts_on_what_is_deployed_has_a_gauge(name: str) -> None:
    found = preset(name)
    recipe = stages.stages_of(found)[-1].recipe(stages.Networks(found, ALONE))
    crafts = found.defense in PIPELINE or name.startswith("digits_menet_a") or isinstance(recipe, TargetRecipe)
    assert recipe.attacks_deployed is crafts
    if crafts:
        deployed = recipe.deployed()
        assert deployed is not None
        assert -1 <= overfitting(recipe, deployed, load(found.data, found.seed).held_out, found, ALONE, 4) <= 1


@pytest.mark.parametrize("masks", ["shared", "fresh"])
def test_pgd_knows_the_masks_no_better_than_the_training_attack(masks: Literal["shared", "fresh"]) -> None:
    found = preset("digits_smoke")
    assert isinstance(found, DirRun)
    found = replace(found, dir=replace(found.dir, crafting_masks=masks))
    recipe = stages.stages_of(found)[-1].recipe(stages.Networks(found, ALONE))
    deployed, seen = recipe.deployed(), list[Tensor]()
    assert isinstance(deployed, Defended)
    deployed.purifier.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    overfitting(recipe, deployed, load(found.data, found.seed).held_out, found, ALONE, 4)
    *crafting, first, second = seen
    assert torch.equal(first, second)  # both are judged under the same
    known = [torch.equal(draws, first) for draws in crafting[-20:]]
    assert all(known) if masks == "shared" else not any(known)
    assert len({tuple(draws.flatten().tolist()) for draws in crafting[-20:]}) == (1 if masks == "shared" else 20)


@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_a_target_that_learns_together_with_its_denoiser_has_a_gauge(objective: str) -> None:
    name = "cifar10_joint_smoke" if objective == "at" else f"cifar10_joint_{objective}_smoke"
    found = preset(name)
    recipe = stages.stages_of(found)[-1].recipe(stages.Networks(found, ALONE))
    assert recipe.attacks_deployed
    assert recipe.renews_draws


@pytest.mark.parametrize(("kind", "warned"), [(Harmless, True), (TargetRecipe, False)])
def test_it_is_a_curve_and_past_15_points_a_warning(
    classifier: nn.Module, run: RunConfig, tmp_path: Path, kind: type[TargetRecipe], warned: bool
) -> None:
    record, listener, data = Record(), Hears(), load(run.data, run.seed)
    assert isinstance(data.train, Split)
    recipe = kind(classifier, run.target, run.attack)
    stage = Stage("target", lambda modules: recipe, 1, {"classifier": run.target.optimizer})
    loader = Loader(data.train, run.training.batch_size, run.seed, "target")
    Trainer(stage, recipe, loader, data.held_out, run, ALONE, Checkpoints(tmp_path, "k"), record, listener).run()
    assert (record.points["held_out/overfitting"] > 0.15) is warned
    assert any("catastrophic overfitting" in line for line in listener.lines) is warned


def test_a_naturally_trained_target_has_no_such_curve(classifier: nn.Module, run: RunConfig) -> None:
    natural = dataclasses.replace(run.target, objective="natural")
    assert not TargetRecipe(classifier, natural, run.attack).attacks_deployed
