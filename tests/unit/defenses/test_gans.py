"""APE-GAN and NRP: their losses against a plain reading, their updates in order, and the samples of both."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import AttackConfig, ConfigError, DataConfig, ScalingConfig
from dircluster.defenses.apegan import ApeganRecipe, GeneratorPurifier
from dircluster.defenses.denoiser import GanRecipe
from dircluster.defenses.nrp import NrpPurifier, NrpRecipe
from dircluster.defenses.recipe import Batch
from dircluster.defenses.table import find_defense
from dircluster.models import classifiers
from dircluster.models.apegan import Discriminator
from dircluster.models.nrp import Critic
from dircluster.presets import preset
from dircluster.presets.apegan import ApeganConfig
from dircluster.presets.compared import AdversarialConfig
from dircluster.presets.nrp import NrpConfig, NrpNetConfig
from dircluster.rng import Stream
from dircluster.training.stages import stages_of

ATTACK = AttackConfig(epsilon=0.15, steps=2)
N = 6


def recipe(name: str, adversarial: AdversarialConfig | None = None, **config: Any) -> GanRecipe:
    """Small networks in float64, none of them in a special state."""
    with rng.seeded_torch_rng(0, name):
        classifier = classifiers.build("small_cnn", DataConfig())
        if name == "apegan":
            nets = GeneratorPurifier(1, 4), Discriminator(1, 8, 8, 4), classifier
            made: GanRecipe = ApeganRecipe(*nets, ApeganConfig(**config), ATTACK, adversarial)
        else:
            nrp = NrpPurifier(1, features=4, growth=2, blocks=1), Critic(1, 8, 8, 4), classifier
            made = NrpRecipe(*nrp, NrpConfig(**config), ATTACK, adversarial)
    return made.double().train()


def batch_of(made: GanRecipe, n: int = N) -> Batch:
    generator = torch.Generator().manual_seed(n)
    images = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    stream = Stream(0, 0, 0, n, slice(0, n), torch.device("cpu"))
    return made.attack(made.batch(images, torch.randint(10, (n,), generator=generator), stream))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def cross_entropy(score: float, real: bool) -> float:
    chance = 1 / (1 + math.exp(-score))
    return -math.log(chance if real else 1 - chance)


def squares(a: Tensor, b: Tensor) -> float:
    return mean([(x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)])


@pytest.mark.parametrize("content", ["rmse", "mse"])
def test_losses_of_ape_gan(content: Any) -> None:
    made = recipe("apegan", content=content)
    batch = batch_of(made)
    restored = made.purifier(batch.attacked).detach()
    real, fake = made.discriminator(batch.images).tolist(), made.discriminator(restored).tolist()
    taught = mean([cross_entropy(s, True) for s in real]) + mean([cross_entropy(s, False) for s in fake])
    assert made(batch, 0)["loss"].item() == pytest.approx(taught, rel=1e-5)
    distance = squares(2 * restored - 1, 2 * batch.images - 1)
    distance = math.sqrt(distance) if content == "rmse" else distance
    fooling = mean([cross_entropy(s, True) for s in fake])
    for update in (1, 2):
        terms = made(batch, update)
        assert terms["content"].item() == pytest.approx(distance, rel=1e-5)
        assert terms["fooling"].item() == pytest.approx(fooling, rel=1e-5)
        assert terms["loss"].item() == pytest.approx(0.7 * distance + 0.3 * fooling, rel=1e-5)


@pytest.mark.parametrize(("distance", "layer"), [("mae", "middle"), ("mse", "last")])
def test_losses_of_nrp(distance: Any, layer: Any) -> None:
    made = recipe("nrp", distance=distance, layer=layer)
    batch = batch_of(made)
    restored = made.purifier(batch.attacked).detach()
    real, fake = made.discriminator(batch.images).tolist(), made.discriminator(restored).tolist()

    def ragan(higher: list[float], lower: list[float]) -> float:
        first = mean([cross_entropy(s - mean(lower), True) for s in higher])
        return (first + mean([cross_entropy(s - mean(higher), False) for s in lower])) / 2

    assert made(batch, 0)["loss"].item() == pytest.approx(ragan(real, fake), rel=1e-5)

    def features(images: Tensor) -> Tensor:
        values = (images - 0.5) / 0.5
        for part in list(made.classifier.network)[:4]:  # type: ignore[arg-type]  # up to the second ReLU
            values = part(values)
        return values.detach()

    pairs = zip(features(restored).flatten().tolist(), features(batch.images).flatten().tolist(), strict=True)
    feature = mean([abs(a - b) if distance == "mae" else (a - b) ** 2 for a, b in pairs])
    terms = made(batch, 1)
    assert terms["feature"].item() == pytest.approx(feature, rel=1e-5)
    assert terms["image"].item() == pytest.approx(squares(restored, batch.images), rel=1e-5)
    assert terms["fooling"].item() == pytest.approx(ragan(fake, real), rel=1e-5)
    expected = feature + 1e-2 * squares(restored, batch.images) + 5e-3 * ragan(fake, real)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_nrp_is_cut_to_the_pixel_range_where_asked_and_not_while_it_is_trained() -> None:
    images = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = {}
    for clamp in (None, False, True):
        run: Any = preset("digits_nrp")
        run = run if clamp is None else replace(run, model=replace(run.model, clamp=clamp))
        purifier = find_defense("nrp").build(run, "purifier")
        with torch.no_grad():
            for weight in purifier.head.parameters():  # type: ignore[union-attr]
                weight.mul_(20)  # so that much of what it makes is no pixel
            made[clamp] = purifier.train()(images), purifier.eval()(images)
    as_before, off, on = made[None], made[False], made[True]
    assert bool((as_before[1] < 0).any())
    assert bool((as_before[1] > 1).any())
    for found in (*as_before, *off, on[0]):
        assert torch.equal(found, as_before[0])
    assert torch.equal(on[1], as_before[1].clamp(0, 1))


@pytest.mark.parametrize(("name", "denoisers"), [("apegan", 2), ("nrp", 1)])
def test_the_discriminator_is_taught_first_and_each_update_its_own_network(name: str, denoisers: int) -> None:
    made = recipe(name)
    assert made.updates == (("discriminator",), *[("purifier",)] * denoisers)
    batch = batch_of(made)
    made(batch, 0)["loss"].backward()
    assert all(p.grad is not None for p in made.discriminator.parameters())
    assert all(p.grad is None for p in made.purifier.parameters())
    made(batch, 1)["loss"].backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.purifier.parameters())
    assert all(p.grad is None for p in made.classifier.parameters())
    assert not any(part.training for part in made.classifier.modules())


@pytest.mark.parametrize("name", ["apegan", "nrp"])
def test_plain_samples_know_nothing_of_the_denoiser_and_adversarial_ones_do(name: str) -> None:
    for adversarial in (None, AdversarialConfig()):
        made = recipe(name, adversarial)
        before = batch_of(made)
        with torch.no_grad():
            for weight in made.purifier.parameters():
                weight.add_(0.3)
        after = batch_of(made)
        assert torch.equal(before.attacked, after.attacked) == (adversarial is None)
        for batch in (before, after):
            moved = (batch.attacked - batch.images).abs().amax(dim=(1, 2, 3))
            assert torch.equal(moved == 0, batch.draws["natural"] < 0.5)
            assert float(moved.max()) <= ATTACK.epsilon + 1e-6


@pytest.mark.parametrize("name", ["apegan", "nrp"])
def test_cross_entropy_alone_leaves_the_discriminator(name: str) -> None:
    made = recipe(name, AdversarialConfig(objective="ce"))
    batch = batch_of(made)
    assert made.updates == (("purifier",),)
    chances = made.classifier(made.purifier(batch.attacked)).softmax(dim=1)
    expected = -mean([math.log(chances[i, label].item()) for i, label in enumerate(batch.labels.tolist())])
    loss = made(batch)["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert {name.split(".")[0] for name, p in made.named_parameters() if p.grad is not None} == {"purifier"}


def test_self_supervised_samples_take_features_away_from_clipped_noise() -> None:
    made = recipe("nrp", samples="ssp", natural=0.0)
    batch = batch_of(made)
    features: Any = made.features  # type: ignore[attr-defined]
    low, high = (batch.images - 0.15).clamp(0, 1), (batch.images + 0.15).clamp(0, 1)
    x = torch.minimum(torch.maximum(batch.draws["ssp"].double(), low), high)
    for _ in range(2):
        x = x.detach().requires_grad_(True)
        (features(x) - features(batch.images)).square().mean(dim=(1, 2, 3)).sum().backward()
        assert x.grad is not None
        x = torch.minimum(torch.maximum(x + 0.15 / 4 * x.grad.sign(), low), high)
    torch.testing.assert_close(batch.attacked, x.detach())
    other = replace(batch, labels=(batch.labels + 1) % 10)
    assert torch.equal(made.attack(other).attacked, batch.attacked)  # without labels


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("digits_apegan", DataConfig(height=12), "data.height must be a multiple of 8 for APE-GAN"),
        ("digits_nrp", DataConfig(width=3), "must be at least 4 for NRP"),
    ],
)
def test_images_that_do_not_fit_are_refused(name: str, data: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(preset(name), data=data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ApeganConfig(generator_steps=0), "apegan.generator_steps must be positive"),
        (lambda: ApeganConfig(natural=1.0), "apegan.natural must lie in"),
        (lambda: ApeganConfig(content_weight=-1), "apegan.content_weight must be 0 or more"),
        (lambda: NrpConfig(natural=-0.1), "nrp.natural must lie in"),
        (lambda: NrpConfig(image_weight=-1), "nrp.image_weight must be 0 or more"),
        (lambda: NrpNetConfig(blocks=0), "model.blocks must be positive"),
        (lambda: AdversarialConfig(epochs=0), "adversarial.epochs must be positive"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_both_stages_of_ape_gan_end_on_the_weights_that_are_asked_for(keep: Any) -> None:
    run: Any = preset("digits_apegan_a")
    asked = replace(run, apegan=replace(run.apegan, keep=keep))
    assert [stage.keep for stage in stages_of(asked)] == ["best", keep, keep]
    assert [stage.keep for stage in stages_of(run)] == ["best"] * 3


@pytest.mark.parametrize("name", ["digits_apegan", "digits_nrp_a"])
def test_several_workers_are_refused_before_anything_is_trained(name: str) -> None:
    with pytest.raises(ConfigError, match=r"scaling.workers must be 1 to train (apegan|nrp_a), got 1:2"):
        stages_of(replace(preset(name), scaling=ScalingConfig(workers="1:2")))
