"""Every loss against a plain float64 reading of the paper, and what a step costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import AttackConfig, ConfigError, DataConfig, TargetConfig, with_values
from dircluster.defenses.dir import DirRecipe, JointRecipe, MaskedPurifier, PretrainRecipe
from dircluster.defenses.recipe import Batch
from dircluster.defenses.table import find_defense
from dircluster.defenses.target import TargetRecipe, mart_terms
from dircluster.models.classifiers import build
from dircluster.models.modules import under_attack
from dircluster.presets import preset
from dircluster.presets.dir import DirConfig, MaskingConfig
from dircluster.training.stages import Networks, stages_of
from tests.conftest import ALONE
from tests.unit.defenses.conftest import TINY

ATTACK = AttackConfig(epsilon=0.1, steps=3)
MakeBatch = Callable[..., Batch]


def parts(ratio: float = 0.5) -> tuple[MaskedPurifier, nn.Module]:
    with rng.seeded_torch_rng(0, "parts"):
        return MaskedPurifier(TINY, MaskingConfig(ratio=ratio), 1, 8, 8), build("small_cnn", DataConfig())


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    exponentials = [math.exp(s - top) for s in scores]
    return [e / sum(exponentials) for e in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def rows(logits: Tensor) -> list[list[float]]:
    return [softmax(row) for row in logits.double().tolist()]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_eq_2_pretraining(make_batch: MakeBatch) -> None:
    denoiser, classifier = parts(ratio=0.7)
    recipe = PretrainRecipe(denoiser, classifier, ATTACK)
    batch = recipe.attack(make_batch(recipe))
    terms, kept = recipe(batch), denoiser.masks(batch.draws["masks"])
    errors: dict[str, list[float]] = {"natural": [], "adversarial": []}
    for name, images in (("natural", batch.images), ("adversarial", batch.adversarial)):
        for k in range(4):
            for n in range(4):
                restored = denoiser.restore_each(images[n : n + 1], kept[k : k + 1, n : n + 1])[0, 0]
                errors[name] += [((restored - batch.images[n]).double() ** 2).sum().item() / 64]
    assert terms["natural"].item() == pytest.approx(mean(errors["natural"]), rel=1e-5)
    assert terms["adversarial"].item() == pytest.approx(mean(errors["adversarial"]), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(mean(errors["natural"] + errors["adversarial"]), rel=1e-5)


def test_pretraining_attacks_the_target_alone(make_batch: MakeBatch) -> None:
    denoiser, classifier = parts()
    recipe = PretrainRecipe(denoiser, classifier, ATTACK)
    with torch.no_grad():
        first = recipe.attack(make_batch(recipe)).adversarial
        for parameter in denoiser.parameters():
            parameter.mul_(2)
    assert torch.equal(first, recipe.attack(make_batch(recipe)).adversarial)


@pytest.mark.parametrize("objective", ["at", "trades", "mart"])
def test_awp_is_the_gradient_at_moved_weights(make_batch: MakeBatch, objective: Any) -> None:
    """Wu et al. 2020: each layer's weights move along their gradient by a share of their norm; biases stay."""
    _, classifier = parts()
    recipe = TargetRecipe(classifier, TargetConfig(objective=objective, awp=0.01), ATTACK)
    plain = TargetRecipe(classifier, TargetConfig(objective=objective), ATTACK)
    recipe, batch = recipe.double(), make_batch(recipe)
    batch = recipe.attack(dataclasses.replace(batch, images=batch.images.double()))
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    recipe(batch)["loss"].backward()
    found = {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())

    classifier.zero_grad()
    plain(batch)["loss"].backward()
    with torch.no_grad():
        for p in classifier.parameters():
            assert p.grad is not None
            if p.dim() > 1:
                p += 0.01 * p.norm() * p.grad / p.grad.norm()
    classifier.zero_grad()
    plain(batch)["loss"].backward()
    for name, p in classifier.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad)


def test_awp_leaves_alone_what_is_frozen_or_has_no_part(make_batch: MakeBatch) -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.spare, self.head = nn.Linear(64, 16), nn.Linear(3, 3), nn.Linear(16, 10)
            self.frozen.requires_grad_(False)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.head(self.frozen(images.flatten(1)))
            return found

    recipe = TargetRecipe(Partly(), TargetConfig(objective="at", awp=0.01), ATTACK)
    recipe(recipe.attack(make_batch(recipe)))["loss"].backward()
    assert {name for name, p in recipe.classifier.named_parameters() if p.grad is not None} == {
        "head.weight",
        "head.bias",
    }


def test_awp_counts_batch_statistics_once_and_needs_one_worker(make_batch: MakeBatch) -> None:
    classifier = build("resnet18", DataConfig(channels=1))
    recipe = TargetRecipe(classifier.train(), TargetConfig(awp=0.005), ATTACK)
    recipe(dataclasses.replace(batch := make_batch(recipe), adversarial=batch.images))
    counts = {int(value) for name, value in classifier.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {1}
    assert recipe.alone == "perturbs weights by a whole batch (target.awp)"
    with pytest.raises(ConfigError, match=r"target\.awp"):
        TargetConfig(awp=1.5)


@pytest.mark.parametrize(("alpha", "mse"), [(2.0, 0.0), (0.5, 3.0)])
def test_eq_5_to_7(make_batch: MakeBatch, alpha: float, mse: float) -> None:
    denoiser, classifier = parts()
    recipe = DirRecipe(denoiser, classifier, DirConfig(alpha=alpha, mse_weight=mse), ATTACK)
    batch = recipe.attack(make_batch(recipe))
    terms = recipe(batch)
    kept = denoiser.masks(batch.draws["masks"])
    each = torch.stack([denoiser.restore_each(batch.adversarial, kept[k : k + 1])[0] for k in range(2)])
    restored = each.sum(dim=0) / 2  # Eq. 5, second line
    delta = recipe.perturb(batch, restored.detach(), classifier(restored).detach())
    p, q = rows(classifier(restored)), rows(classifier(restored + delta))
    l_adv = -mean([math.log(p[i][y]) for i, y in enumerate(batch.labels.tolist())])
    l_rep = mean([kl(a, b) for a, b in zip(p, q, strict=True)])
    assert terms["adversarial"].item() == pytest.approx(l_adv, rel=1e-5)
    assert terms["representation"].item() == pytest.approx(l_rep, rel=1e-3, abs=1e-7)
    expected = l_adv + alpha * l_rep
    if mse:
        distance = ((restored - batch.images).double() ** 2).mean().item()
        assert terms["mse"].item() == pytest.approx(distance, rel=1e-5)
        expected += mse * distance
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_both_terms_of_dir_teach_the_denoiser_and_delta_is_constant(make_batch: MakeBatch) -> None:
    denoiser, classifier = parts()
    recipe = DirRecipe(denoiser, classifier, DirConfig(), ATTACK)
    batch = recipe.attack(make_batch(recipe))
    for term in ("adversarial", "representation"):
        denoiser.zero_grad()
        recipe(batch)[term].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())
        assert denoiser.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in classifier.parameters())
    assert not recipe.perturb(batch, batch.images, classifier(batch.images).detach()).requires_grad


def test_dir_crafts_against_the_whole_pipeline_under_the_shared_masks(make_batch: MakeBatch) -> None:
    denoiser, classifier = parts()
    recipe = DirRecipe(denoiser, classifier, DirConfig(), ATTACK)
    batch = make_batch(recipe)
    crafted = recipe.attack(batch)
    x = (batch.images + 0.1 * (2 * batch.draws["pgd"] - 1)).clamp(0, 1)
    for _ in range(3):
        x.requires_grad_(True)
        loss = nn.functional.cross_entropy(
            recipe.deployed().logits(x, batch.draws["masks"]), batch.labels, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, x)
        x = torch.clamp(x.detach() + 0.025 * gradient.sign(), batch.images - 0.1, batch.images + 0.1).clamp(0, 1)
    torch.testing.assert_close(crafted.adversarial, x)
    other = DirRecipe(denoiser, classifier, DirConfig(crafting_masks="fresh"), ATTACK)
    fresh = other.attack(make_batch(other))
    assert torch.equal(fresh.draws["masks"], batch.draws["masks"])
    assert not torch.equal(fresh.adversarial, crafted.adversarial)


@pytest.mark.parametrize("masks", ["shared", "fresh"])
def test_each_step_of_crafting_meets_masks_of_its_own_or_those_of_the_update(make_batch: MakeBatch, masks: Any) -> None:
    denoiser, classifier = parts()
    recipe = DirRecipe(denoiser, classifier, DirConfig(crafting_masks=masks), ATTACK)
    batch, met = make_batch(recipe), list[Tensor]()
    denoiser.register_forward_pre_hook(lambda module, given: met.append(given[1]))
    recipe.attack(batch)
    names = ["masks"] * 3 if masks == "shared" else ["masks/1", "masks/2", "masks/3"]
    assert all(torch.equal(draws, batch.draws[name]) for draws, name in zip(met, names, strict=True))
    assert len({tuple(draws.flatten().tolist()) for draws in met}) == len(set(names))


def test_in_joint_mode_eq_4_starts_from_what_the_target_answers_while_it_is_attacked(
    make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from logits of the update, whose statistics are those of the batch."""
    denoiser, asked = parts()[0], list[tuple[Tensor, Tensor]]()
    target = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))

    def perturbation(model: nn.Module, restored: Tensor, reference: Tensor, *_: Any) -> Tensor:
        asked.append((reference, model(restored).detach()))
        return torch.zeros_like(restored)

    monkeypatch.setattr("dircluster.defenses.dir.perturbation", perturbation)
    recipe = DirRecipe(denoiser, target, DirConfig(joint=True, alpha=1), ATTACK).train()
    recipe(recipe.attack(make_batch(recipe)))
    ((reference, answered),) = asked
    assert torch.equal(reference, answered)


def test_the_frozen_target_stays_as_it_is(make_batch: MakeBatch) -> None:
    denoiser, _ = parts()
    target = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    recipe = DirRecipe(denoiser, target, DirConfig(), ATTACK).train()
    recipe(recipe.attack(make_batch(recipe)))["loss"].backward()
    assert not target.training
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_joint_mode_teaches_both(make_batch: MakeBatch) -> None:
    denoiser, classifier = parts()
    recipe = DirRecipe(denoiser, classifier, DirConfig(joint=True, alpha=1), ATTACK).train()
    recipe(recipe.attack(make_batch(recipe)))["loss"].backward()
    for module in (denoiser, classifier):
        assert all(p.grad is not None for p in module.parameters())
    assert classifier.training


@pytest.mark.parametrize(("objective", "beta"), [("trades", 6.0), ("mart", 6.0), ("mart", None)])
def test_joint_mode_by_trades_and_mart(make_batch: MakeBatch, objective: Any, beta: float | None) -> None:
    """Their losses on h(g(x)): both image kinds restored, each under masks of its own, and no L_rep."""
    denoiser, classifier = parts()
    target = TargetConfig(objective=objective, beta=beta)
    knobs = DirConfig(joint=True, alpha=0.0, crafting_masks="fresh")
    recipe = JointRecipe(denoiser, classifier, knobs, ATTACK, target).double().train()
    batch = make_batch(recipe)
    batch = recipe.attack(dataclasses.replace(batch, images=batch.images.double()))
    assert not torch.equal(batch.draws["masks/natural"], batch.draws["masks"])

    def chances(images: Tensor, draws: Tensor) -> list[list[float]]:
        kept = denoiser.masks(draws)
        each = [denoiser.restore_each(images, kept[k : k + 1])[0] for k in range(2)]
        return rows(classifier(sum(each) / 2))

    p, q = chances(batch.images, batch.draws["masks/natural"]), chances(batch.attacked, batch.draws["masks"])
    first, divergences = [], []
    for a, b, y in zip(p, q, batch.labels.tolist(), strict=True):
        if objective == "trades":
            first.append(-math.log(a[y]))
            divergences.append(kl(a, b))
        else:
            first.append(-math.log(b[y]) - math.log(1 - max(b[k] for k in range(10) if k != y)))
            divergences.append(kl(a, b) * (1 - a[y]))
    terms = recipe(batch)
    assert set(terms) == {"loss", "divergence", "natural" if objective == "trades" else "boosted"}
    assert terms["divergence"].item() == pytest.approx(mean(divergences), rel=1e-3)
    expected = mean(first) + (5 if beta is None else beta) * mean(divergences)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    terms["loss"].backward()
    assert recipe.trained == ("denoiser", "classifier")
    for module in (denoiser, classifier):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_joint_mode_crafts_alike_whatever_it_learns_by(make_batch: MakeBatch) -> None:
    """PGD on the cross-entropy of h(g(x)), new masks at every step, for TRADES too."""
    denoiser, classifier = parts()
    knobs = DirConfig(joint=True, alpha=0.0, crafting_masks="fresh")
    plain = DirRecipe(denoiser, classifier, knobs, ATTACK)
    paired = JointRecipe(denoiser, classifier, knobs, ATTACK, TargetConfig(objective="trades"))
    found = [recipe.attack(make_batch(recipe)).attacked for recipe in (plain, paired)]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(("name", "rate"), [("cifar10_joint_trades", 6e-5), ("cifar10_joint_mart", 5e-5)])
def test_presets_of_joint_mode_are_the_deleted_scripts(name: str, rate: float) -> None:
    run: Any = preset(name)
    (stage,) = stages_of(run)
    assert isinstance(stage.recipe(Networks(preset(f"{name}_smoke"), ALONE)), JointRecipe)
    assert (run.target.objective, run.target.weight) == (name.rpartition("_")[2], 6.0)
    assert (run.attack.steps, run.attack.step, run.training.batch_size) == (10, 2 / 255, 128)
    assert (stage.epochs, stage.keep) == (91, "last")
    rates = stage.optimizers
    assert {optimizer.weight_decay for optimizer in rates.values()} == {2e-4}
    assert [rates["denoiser"].rate(epoch, 91) for epoch in (0, 90)] == [rate, rate]
    target = [rates["classifier"].rate(epoch - 1, 91) for epoch in (74, 75, 89, 90)]  # their epochs begin at 1
    assert target == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert "learned together, by" in find_defense("dir").describe(run)
    assert not run.printed


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("target.objective", "natural", "target.objective must be at, trades or mart in joint mode"),
        ("dir.alpha", 1.0, "dir.alpha must be 0 where trades is learned in joint mode"),
        ("dir.mse_weight", 0.5, "dir.mse_weight must be 0 where trades is learned"),
        ("pretrain.epochs", 1, "pretrain.epochs must be 0 in joint mode"),
    ],
)
def test_what_joint_mode_cannot_learn_is_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_values(preset("cifar10_joint_trades"), {setting: value})


def test_adversarial_and_natural_training(make_batch: MakeBatch) -> None:
    _, classifier = parts()
    for objective in ("natural", "at"):
        recipe = TargetRecipe(classifier, TargetConfig(objective=objective), ATTACK)  # type: ignore[arg-type]
        batch = make_batch(recipe)
        crafted = recipe.attack(batch)
        images = batch.images if objective == "natural" else crafted.adversarial
        p = rows(classifier(images))
        expected = -mean([math.log(p[i][y]) for i, y in enumerate(batch.labels.tolist())])
        assert recipe(crafted)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_trades(make_batch: MakeBatch) -> None:
    _, classifier = parts()
    recipe = TargetRecipe(classifier, TargetConfig(objective="trades"), ATTACK)
    batch = recipe.attack(make_batch(recipe))
    p, q = rows(classifier(batch.images)), rows(classifier(batch.adversarial))
    natural = -mean([math.log(p[i][y]) for i, y in enumerate(batch.labels.tolist())])
    divergence = mean([kl(a, b) for a, b in zip(p, q, strict=True)])
    terms = recipe(batch)
    assert terms["divergence"].item() == pytest.approx(divergence, rel=1e-3)
    assert terms["loss"].item() == pytest.approx(natural + 6 * divergence, rel=1e-5)
    assert (batch.adversarial - batch.images).abs().max() <= 0.1 + 1e-6


def test_mart(make_batch: MakeBatch) -> None:
    natural = torch.randn(6, 10, generator=rng.generator(0, "a"), dtype=torch.float64) * 2
    adversarial = torch.randn(6, 10, generator=rng.generator(0, "b"), dtype=torch.float64) * 2
    labels = torch.tensor([0, 3, 9, 1, 2, 2])
    p, q = rows(natural), rows(adversarial)
    bce, weighted = [], []
    for i, y in enumerate(labels.tolist()):
        others = max(q[i][k] for k in range(10) if k != y)
        bce.append(-math.log(q[i][y]) - math.log(1 - others))
        weighted.append(kl(p[i], q[i]) * (1 - p[i][y]))
    boosted, divergence = mart_terms(natural, adversarial, labels)
    assert boosted.item() == pytest.approx(mean(bce), rel=1e-5)
    assert divergence.item() == pytest.approx(mean(weighted), rel=1e-5)
    _, classifier = parts()
    recipe = TargetRecipe(classifier, TargetConfig(objective="mart"), ATTACK)
    terms = recipe(recipe.attack(make_batch(recipe)))
    assert terms["loss"].item() == pytest.approx((terms["boosted"] + 5 * terms["divergence"]).item())


def test_mart_survives_certainty() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0]], requires_grad=True)
    boosted, divergence = mart_terms(logits, logits, torch.tensor([1]))
    (boosted + divergence).backward()
    assert boosted.isfinite()
    assert logits.grad.isfinite().all()


def test_crafting_restores_modes(make_batch: MakeBatch) -> None:
    denoiser, classifier = parts()
    classifier.train()
    denoiser.eval()
    with under_attack(denoiser, classifier):
        assert not classifier.training
        assert not any(p.requires_grad for p in classifier.parameters())
    assert classifier.training
    assert not denoiser.training


def test_a_dir_step_passes_six_times_through_g_and_twelve_times_through_h(make_batch: MakeBatch) -> None:
    """At the paper's setting: 5 crafting steps, 5 perturbing steps, one update."""
    denoiser, classifier = parts()
    recipe = DirRecipe(denoiser, classifier, DirConfig(), dataclasses.replace(ATTACK, steps=5)).train()
    calls = {"denoiser": 0, "classifier": 0}
    for name in calls:
        recipe.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    recipe(recipe.attack(make_batch(recipe)))["loss"].backward()
    assert calls == {"denoiser": 6, "classifier": 12}


@pytest.mark.parametrize("objective", ["natural", "at", "trades", "mart"])
def test_a_step_of_the_target_passes_as_often_as_its_stage_says(make_batch: MakeBatch, objective: str) -> None:
    run = with_values(preset("digits_smoke"), {"target.objective": objective, "target.trades_steps": 3})
    stage = stages_of(run)[0]
    recipe = stage.recipe(Networks(run, ALONE))
    passes: list[nn.Module] = []
    recipe.get_submodule("classifier").register_forward_pre_hook(lambda module, inputs: passes.append(module))
    recipe(recipe.attack(make_batch(recipe)))
    assert len(passes) == stage.passes
