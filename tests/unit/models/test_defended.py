"""h(g(x)) as one module, with fresh or fixed masks."""

from __future__ import annotations

import pytest
import torch

from dircluster import rng
from dircluster.config import DataConfig, MaskingConfig, ModelConfig
from dircluster.models.classifiers import build
from dircluster.models.defended import DefendedClassifier, frozen
from dircluster.models.denoiser import MaskedDenoiser

TINY = ModelConfig(patch=2, width=16, heads=2, encoder_depth=1, decoder_depth=1)


@pytest.fixture
def defended() -> DefendedClassifier:
    with rng.ambient(0, "defended"):
        denoiser, classifier = MaskedDenoiser(TINY, 1, 8, 8), build("small_cnn", DataConfig())
    return DefendedClassifier(denoiser, classifier, MaskingConfig()).eval()


IMAGES = torch.rand(6, 1, 8, 8, generator=rng.generator(0, "images"))


def test_fresh_masks_differ_at_each_call(defended: DefendedClassifier) -> None:
    assert not torch.equal(defended(IMAGES), defended(IMAGES))


def test_a_seeded_stream_of_fresh_masks_repeats(defended: DefendedClassifier) -> None:
    first = [defended.fresh(seed=1)(IMAGES), defended(IMAGES)]
    again = [defended.fresh(seed=1)(IMAGES), defended(IMAGES)]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("draws", [1, 3])
def test_fixed_masks_make_a_function_of_the_image_alone(defended: DefendedClassifier, draws: int) -> None:
    defended.fixed(seed=5, draws=draws)
    whole = defended(IMAGES)
    assert torch.equal(whole, defended(IMAGES))
    alone = torch.cat([defended(IMAGES[i : i + 1]) for i in reversed(range(6))]).flip(0)
    torch.testing.assert_close(alone, whole)
    assert not torch.equal(whole, defended.fixed(seed=6, draws=draws)(IMAGES))


def test_logits_are_averaged_over_draws(defended: DefendedClassifier) -> None:
    averaged = defended.fresh(seed=2, draws=3)(IMAGES)
    defended.fresh(seed=2)
    separate = torch.stack([defended(IMAGES) for _ in range(3)]).mean(dim=0)
    torch.testing.assert_close(averaged, separate)


def test_global_random_state_is_left_alone(defended: DefendedClassifier) -> None:
    before = torch.random.get_rng_state()
    defended.fresh()(IMAGES)
    defended.fixed(0)(IMAGES)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frozen_gives_back_what_it_took(defended: DefendedClassifier) -> None:
    defended.classifier.requires_grad_(False)
    asked = [p.requires_grad for p in defended.parameters()]
    with frozen(defended):
        assert not any(p.requires_grad for p in defended.parameters())
    assert [p.requires_grad for p in defended.parameters()] == asked
