"""All comparison systems alike: one target for all, stages that are shared, costs, cards, and the two controls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dircluster.config import flatten, to_dict, with_values
from dircluster.defenses.recipe import Batch
from dircluster.defenses.table import DEFENSES, find_defense
from dircluster.presets import PRESETS, RUNS, preset
from dircluster.training.costs import step_operations
from dircluster.training.stages import Networks, find_stage, stage_key, stages_of
from tests.conftest import ALONE

COMPARED = ("apegan", "apegan_a", "hgd", "hgd_a", "nrp", "nrp_a", "jatp", "identity", "finetune")
INPUTS: dict[str, str | None] = {"data": "0" * 64}


def macs(name: str, stage: str) -> float:
    """Giga multiply-adds of a step, an image."""
    run = preset(name)
    return step_operations(run, stage) / 2e9 / run.training.batch_size


@pytest.mark.parametrize("data", ["digits", "cifar10", "svhn"])
@pytest.mark.parametrize("system", COMPARED)
@pytest.mark.parametrize("twin", ["", "_smoke"])
def test_all_stand_before_the_target_of_dir(system: str, data: str, twin: str) -> None:
    """So that each finds what another has trained."""
    run, other = preset(f"{data}_{system}{twin}"), preset(f"{data}{twin}")
    assert (run.defense, run.name, run.data) == (system, f"{data}_{system}{twin}", other.data)
    keys = [stage_key(each, find_stage(each, "target"), INPUTS) for each in (run, other)]
    assert keys[0] == keys[1]


def test_every_defense_has_presets_and_settings() -> None:
    assert set(RUNS) == set(DEFENSES)
    for name in DEFENSES:
        defense = find_defense(name)
        assert (defense.name, defense.run) == (name, RUNS[name])
        assert any(preset(p).defense == name for p in PRESETS)


@pytest.mark.parametrize("system", ["apegan", "hgd", "nrp"])
def test_the_adversarial_form_begins_with_the_plain_one(system: str) -> None:
    """The same stages, to the key, and one after them that starts from their weights."""
    run, plain = preset(f"digits_{system}_a"), preset(f"digits_{system}")
    stages = stages_of(run)
    assert [stage.name for stage in stages] == ["target", system, f"{system}_a"]
    keys = [stage_key(each, find_stage(each, system), INPUTS) for each in (run, plain)]
    assert keys[0] == keys[1]
    assert set(stages[-1].optimizers) <= set(stages[1].modules)  # what it trains on is what the one before it stores
    made = stages[-1].recipe(Networks(run, ALONE))
    assert made.attacks_deployed
    assert set(made.trained) == set(stages[-1].optimizers)
    other = replace(run, adversarial=replace(run.adversarial, objective="ce"))  # type: ignore[call-arg, attr-defined]
    assert set(stages_of(other)[-1].optimizers) == set(stages_of(other)[-1].recipe(Networks(other, ALONE)).trained)
    assert stage_key(other, find_stage(other, f"{system}_a"), INPUTS) != stage_key(run, stages[-1], INPUTS)


@pytest.mark.parametrize("objective", ["own", "ce"])
def test_hgd_is_trained_on_through_the_pipeline(objective: Any, make_batch: Any) -> None:
    run: Any = preset("digits_hgd_a_smoke")
    run = replace(run, adversarial=replace(run.adversarial, objective=objective))
    recipe: Any = stages_of(run)[-1].recipe(Networks(run, ALONE)).train()
    plain: Batch = make_batch(recipe, n=16)
    batch = recipe.attack(plain)
    expected = {"own": "feature", "ce": "class"}[objective]
    terms = recipe(batch)
    assert set(terms) == {"loss", expected}
    if objective == "ce":
        chances = recipe.classifier(recipe.purifier(batch.attacked)).double().log_softmax(dim=1)
        wanted = -sum(chances[i, y].item() for i, y in enumerate(batch.labels.tolist())) / 16
        assert terms["loss"].item() == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        recipe.purifier.head.weight.add_(0.5)
    assert not torch.equal(recipe.attack(plain).attacked, batch.attacked)


def test_a_step_of_ape_gan_costs_what_was_counted_by_hand() -> None:
    """Ten passes of the target to craft, 0.48 GMAC to update."""
    assert macs("cifar10_apegan", "apegan") == pytest.approx(10 * 0.555 + 0.48, rel=0.01)


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_the_target_is_trained_on_for_what_hgd_costs(data: str) -> None:
    run: Any = preset(f"{data}_finetune")
    ours = macs(f"{data}_finetune", "finetune") * run.finetune.epochs
    hgd: Any = preset(f"{data}_hgd")
    assert ours == pytest.approx(macs(f"{data}_hgd", "hgd") * hgd.hgd.epochs, rel=0.02)


def test_the_identity_is_the_target() -> None:
    run = preset("digits_identity_smoke")
    networks = Networks(run, ALONE)
    defended = find_defense("identity").defended(run, networks)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(defended(images), networks["classifier"](images))
    assert not defended.purifier.randomized
    assert [stage.epochs for stage in stages_of(run)] == [2, 0]


@pytest.mark.parametrize("system", ["apegan", "apegan_a", "hgd", "hgd_a", "nrp", "nrp_a", "jatp"])
def test_cards_say_what_it_is_and_how_it_was_broken(system: str) -> None:
    text = " ".join(find_defense(system).describe(preset(f"cifar10_{system}")).split())
    assert " Broken: " in text
    assert "The DIR paper prints" in text
    trained_on = "against attacks on the whole pipeline that move" if system == "jatp" else "It was then trained on by"
    assert (trained_on in text) == (system.endswith("_a") or system == "jatp")


def test_numbers_of_the_paper_stand_beside_the_plain_systems_alone() -> None:
    assert preset("cifar10_apegan").printed["apegan"]["autoattack-standard"] == 12.91
    assert preset("svhn_nrp").printed["nrp"]["pgd20"] == 34.73
    assert preset("cifar10_jatp").printed["jatp"]["restored20-from-natural"] == 26.79
    assert preset("cifar10_identity").printed["identity"]["pgd20"] == 45.72
    for system in ("apegan_a", "hgd_a", "nrp_a"):
        assert preset(f"svhn_{system}").printed == {"none": {**preset("svhn").printed["none"]}}
    assert not preset("cifar10_finetune").printed  # whose bare rows are of the target trained on


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).printed])
def test_numbers_of_the_paper_stand_beside_its_runs_alone(name: str) -> None:
    """What decides the numbers must be the preset's; where it runs, and how it is judged, need not."""
    run = preset(name)
    anywhere = {"seed": 3, "data.uri": "/data", "evaluation.images": 100, "training.precision": "bf16"}
    assert with_values(run, anywhere).printed == run.printed
    other = {
        "data.limit": 100,
        "attack.epsilon": 4 / 255,
        "target.optimizer.lr": 0.05,
        "training.batch_size": 64,
    }
    own = [name for name in flatten(to_dict(run)) if name.endswith((".epochs", "model.widths", "model.width"))]
    other |= {name: (96,) * 5 if name.endswith("widths") else 96 for name in own}
    for setting, value in other.items():
        assert not with_values(run, {setting: value}).printed, setting


def test_no_number_of_the_paper_stands_beside_a_run_that_is_not_its_own() -> None:
    found = {name for name in PRESETS if preset(name).printed}
    systems = ("", "_apegan", "_apegan_a", "_hgd", "_hgd_a", "_nrp", "_nrp_a", "_jatp", "_identity")
    assert found == {f"{data}{system}" for data in ("cifar10", "svhn") for system in systems} | {
        f"cifar10_{system}" for system in ("menet", "menet_a", "ebm")
    }
