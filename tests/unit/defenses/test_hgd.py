"""HGD: its losses against a plain reading, its samples, its settings, and the one that comes with the package."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import dircluster
from dircluster import rng
from dircluster.config import AttackConfig, ConfigError, DataConfig
from dircluster.defenses.hgd import DEFENSE, HgdRecipe, UNetPurifier
from dircluster.defenses.recipe import Batch
from dircluster.models import classifiers, unet
from dircluster.presets import preset
from dircluster.presets.hgd import Guidance, HgdConfig, HgdRun, UNetConfig
from dircluster.rng import Stream
from dircluster.training.costs import step_operations

ATTACK = AttackConfig(epsilon=0.15, steps=2)


def recipe(images: Tensor, **config: Any) -> HgdRecipe:
    """A small U-net before a small CNN, in the precision of the images."""
    with rng.seeded_torch_rng(0, "hgd"):
        purifier = UNetPurifier(images.shape[1], widths=(8, 16), units=(1, 2))
        classifier = classifiers.build("small_cnn", DataConfig())
    return HgdRecipe(purifier, classifier, HgdConfig(**config), ATTACK).to(images.dtype).train()


def batch_of(made: HgdRecipe, dtype: torch.dtype = torch.float32, n: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 1, 8, 8, generator=generator, dtype=dtype)
    stream = Stream(0, 0, 0, n, slice(0, n), torch.device("cpu"))
    return made.batch(images, torch.randint(10, (n,), generator=generator), stream)


@pytest.mark.parametrize("guidance", get_args(Guidance))
def test_losses_are_those_of_the_paper(guidance: Guidance) -> None:
    """In float64, element by element, with the target's layers written out."""
    made = recipe(torch.zeros(1, 1, 8, 8, dtype=torch.float64), guidance=guidance)
    batch = made.attack(batch_of(made, torch.float64))
    found = made(batch)
    assert set(found) == {"loss", guidance}

    def layers(images: Tensor, count: int | None) -> Tensor:
        network: Any = made.classifier.network
        values = (images - 0.5) / 0.5
        for layer in list(network)[:count]:
            values = layer(values)
        return values

    restored, n = made.purifier(batch.attacked), len(batch.images)
    if guidance == "class":
        chances = torch.softmax(layers(restored, None), dim=1)
        expected = sum(-torch.log(chances[i, label]).item() for i, label in enumerate(batch.labels)) / n
    else:
        depth = {"pixel": 0, "feature": 4, "logit": None}[guidance]  # after the second ReLU; all layers
        ours, clean = (restored, batch.images) if depth == 0 else (layers(restored, depth), layers(batch.images, depth))
        pairs = list(zip(ours.flatten().tolist(), clean.flatten().tolist(), strict=True))
        expected = sum(abs(a - b) for a, b in pairs) / len(pairs)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-6)  # the loss is computed in float32
    found["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in made.purifier.parameters())
    assert all(p.grad is None for p in made.classifier.parameters())


def test_half_of_the_images_stay_natural_and_the_others_are_attacked_at_the_target_alone() -> None:
    made = recipe(torch.zeros(1, 1, 8, 8))
    plain = batch_of(made, n=64)
    batch = made.attack(plain)
    moved = (batch.attacked - batch.images).abs().amax(dim=(1, 2, 3))
    assert torch.equal(moved == 0, batch.draws["natural"] < 0.5)
    assert 20 < int((moved == 0).sum()) < 44
    assert float(moved.max()) <= ATTACK.epsilon + 1e-6
    with torch.no_grad():
        for weight in made.purifier.parameters():
            weight.zero_()
    assert torch.equal(made.attack(plain).attacked, batch.attacked)  # the samples know nothing of the U-net
    everyone = recipe(plain.images, natural=0.0).attack(plain).attacked
    assert bool((everyone != plain.images).flatten(1).any(dim=1).all())


def test_only_the_unet_is_trained() -> None:
    made = recipe(torch.zeros(1, 1, 8, 8))
    assert made.purifier.training
    assert not any(part.training for part in made.classifier.modules())
    assert {name.split(".")[0] for name, p in made.named_parameters() if p.requires_grad} == {"purifier"}


def test_the_loss_falls() -> None:
    made = recipe(torch.zeros(1, 1, 8, 8))
    batch = made.attack(batch_of(made, n=32))
    optimizer = torch.optim.Adam(made.purifier.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = made(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_target_without_a_feature_map_is_refused_for_feature_alone() -> None:
    target, unet_ = nn.Linear(4, 2), UNetPurifier(1, widths=(8, 16), units=(1, 1))
    with pytest.raises(ConfigError, match=r"\(Linear\) does not say .*; use hgd.guidance logit"):
        HgdRecipe(unet_, target, HgdConfig(), ATTACK)
    HgdRecipe(unet_, target, HgdConfig(guidance="logit"), ATTACK)


def test_the_published_settings() -> None:
    run = preset("cifar10_hgd")
    assert isinstance(run, HgdRun)
    assert (run.model.widths, run.model.units) == (unet.WIDTHS, unet.UNITS)
    assert sum(p.numel() for p in DEFENSE.build(run, "purifier").parameters()) == 11_033_984
    rates = [run.hgd.optimizer.rate(epoch, run.hgd.epochs) for epoch in (0, 17.9, 18, 27)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    macs = step_operations(run, "hgd") / 2 / run.training.batch_size  # an image's: five steps of crafting, one update
    assert round(macs / 1e9, 1) == 9.6
    assert run.printed["hgd"]["pgd20"] == 18.07
    assert not replace(run, target=replace(run.target, objective="natural")).printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: replace(run, model=UNetConfig()), "model.widths has 5 stages, which halve images 4 times"),
        (lambda run: replace(run, model=UNetConfig(widths=(8, 8))), r"model.units must be as many as model.widths"),
        (lambda run: replace(run, model=UNetConfig(widths=(8, 0), units=(1, 1))), "model.widths must be positive"),
        (lambda run: replace(run, model=UNetConfig(widths=(8,), units=(1,))), "two stages or more"),
        (lambda run: replace(run, hgd=HgdConfig(natural=1.0)), "hgd.natural must lie in"),
        (lambda run: replace(run, hgd=HgdConfig(epochs=0)), "hgd.epochs must be"),
    ],
)
def test_what_cannot_be_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change(preset("digits_hgd"))


def test_the_shipped_one_gives_an_image_logits_of_its_own() -> None:
    """By running statistics; test_reproduce.py trains one from the command line."""
    defense = dircluster.load_defense("zoo:digits-hgd")
    assert defense.name == "hgd"
    assert defense.settings["model"]["widths"] == [32, 64, 64]
    assert not defense.purifier.randomized
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, again = defense(images), defense(images)
        each = torch.cat([defense(image[None]) for image in images])
    assert torch.equal(whole, again)
    torch.testing.assert_close(each, whole)
