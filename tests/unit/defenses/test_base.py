"""h(g(x)) as one module, with fresh or fixed masks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from dircluster import rng
from dircluster.config import ConfigError, DataConfig
from dircluster.defenses.base import Defended
from dircluster.defenses.dir import MaskedPurifier
from dircluster.models.classifiers import build
from dircluster.models.modules import evaluating, frozen
from dircluster.presets.dir import MaskingConfig, ModelConfig

TINY = ModelConfig(patch=2, width=16, heads=2, encoder_depth=1, decoder_depth=1)


@pytest.fixture
def defended() -> Defended:
    with rng.seeded_torch_rng(0, "defended"):
        denoiser, classifier = MaskedPurifier(TINY, MaskingConfig(), 1, 8, 8), build("small_cnn", DataConfig())
    return Defended(denoiser, classifier).eval()


IMAGES = torch.rand(6, 1, 8, 8, generator=rng.generator(0, "images"))


def test_fresh_masks_differ_at_each_call(defended: Defended) -> None:
    assert not torch.equal(defended(IMAGES), defended(IMAGES))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.to_sparse(), r"images must be dense, got torch.sparse_coo: give images.to_dense\(\)"),
        (torch.nested.nested_tensor([*IMAGES]), r"images must be dense, got a nested tensor: give torch\.stack"),
        (IMAGES.to("meta"), "images are on the meta device, which holds no values"),
    ],
)
def test_images_without_values_in_place(defended: Defended, images: torch.Tensor, message: str) -> None:
    for call in (defended, defended.restore, defended.fixed(0, draws=2)):
        with pytest.raises(ConfigError, match=f"^{message}"):
            call(images)


def test_a_defense_on_the_meta_device_takes_images_there(defended: Defended) -> None:
    made = defended.to("meta").fixed(0)(IMAGES.to("meta"))
    assert (made.device.type, made.shape) == ("meta", (6, 10))


def test_draws_that_are_given_are_those_of_the_defense(defended: Defended) -> None:
    draws = defended.draw(6)
    assert draws is not None
    wrong: dict[str, Any] = {
        r"rows of 16 torch.int64, got 16 torch.float32": draws.float(),
        r"rows of 16 torch.int64, got 3 torch.int64": draws[:, :3],
        r"rows of 16 torch.int64, got 4x4 torch.int64": draws.view(6, 4, 4),
        r"hold what the defense does not draw \(index": draws + 100,
        r"one row an image, got 5 for 6 images": draws[:5],
        r"one row an image, got \(\) for 6 images": draws[0, 0],
        r"one row an image, got list for 6 images": draws.tolist(),
    }
    for message, given in wrong.items():
        with pytest.raises(ConfigError, match=f"^draws .*{message}") as refusal:
            defended(IMAGES, given)
        assert "\n" not in str(refusal.value)
    assert torch.equal(defended(IMAGES, draws), defended.logits(IMAGES, draws))


def test_a_seeded_stream_of_fresh_masks_repeats(defended: Defended) -> None:
    one, other = defended.fresh(seed=1), defended.fresh(seed=1)
    first, again = [one(IMAGES), one(IMAGES)], [other(IMAGES), other(IMAGES)]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("draws", [1, 3])
def test_fixed_masks_make_a_function_of_the_image_alone(defended: Defended, draws: int) -> None:
    fixed = defended.fixed(seed=5, draws=draws)
    whole = fixed(IMAGES)
    assert torch.equal(whole, fixed(IMAGES))
    alone = torch.cat([fixed(IMAGES[i : i + 1]) for i in reversed(range(6))]).flip(0)
    torch.testing.assert_close(alone, whole)
    assert not torch.equal(whole, defended.fixed(seed=6, draws=draws)(IMAGES))


@pytest.mark.parametrize("seed", [None, 1.5, 1.0, "a", True, [0]])
def test_a_seed_is_a_whole_number(seed: Any, defended: Defended) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"seed must be a whole number, got {seed!r}")):
        defended.fixed(seed)
    if seed is not None:
        with pytest.raises(ConfigError, match="seed must be a whole number"):
            defended.fresh(seed)
    fixed = defended.fixed(np.int64(5))  # type: ignore[arg-type]
    assert fixed.is_fixed
    assert torch.equal(fixed(IMAGES), defended.fixed(5)(IMAGES))


def test_logits_are_averaged_over_draws(defended: Defended) -> None:
    averaged = defended.fresh(seed=2, draws=3)(IMAGES)
    single = defended.fresh(seed=2)
    separate = torch.stack([single(IMAGES) for _ in range(3)]).mean(dim=0)
    torch.testing.assert_close(averaged, separate)


def test_views_share_weights_and_change_nothing(defended: Defended) -> None:
    defended = defended.fresh(seed=3)
    same = defended.fresh(seed=3)
    views = [defended.fixed(0), defended.fixed(0).averaged(2), defended.averaged(3), defended.fixed(1).fresh()]
    assert [(view.is_fixed, view.draws) for view in views] == [(True, 1), (True, 2), (False, 3), (False, 1)]
    for view in views:
        view(IMAGES)
        view.register_forward_hook(lambda module, inputs, output: output * 0)
        view.note = torch.nn.Identity()
        assert [*view.parameters()] == [*defended.parameters()]
        assert list(view.state_dict()) == list(defended.state_dict())
    assert (defended.is_fixed, defended.draws, len(list(defended.children()))) == (False, 1, 2)
    assert torch.equal(defended(IMAGES), same(IMAGES))  # no view has drawn from its stream, none has hooked it
    fixed = defended.fixed(0)
    before = fixed(IMAGES)
    with torch.no_grad():
        defended.purifier.head.bias += 1  # the weights are the same ones, not copies
    assert not torch.equal(fixed(IMAGES), before)


def test_modes_come_back_whatever_happens(defended: Defended) -> None:
    defended.train()
    defended.classifier.eval()
    modes = [part.training for part in defended.modules()]

    def fails() -> None:
        with evaluating(defended):
            assert not any(part.training for part in defended.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [part.training for part in defended.modules()] == modes


def test_global_random_state_is_left_alone(defended: Defended) -> None:
    before = torch.random.get_rng_state()
    defended.fresh()(IMAGES)
    defended.fixed(0)(IMAGES)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frozen_gives_back_what_it_took(defended: Defended) -> None:
    defended.classifier.requires_grad_(False)
    asked = [p.requires_grad for p in defended.parameters()]
    with frozen(defended):
        assert not any(p.requires_grad for p in defended.parameters())
    assert [p.requires_grad for p in defended.parameters()] == asked
