"""h(g(x)) as one module, with fresh or fixed masks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from dircluster import rng
from dircluster.config import ConfigError
from dircluster.defenses.base import Defended
from dircluster.models.modules import evaluating, frozen

IMAGES = torch.rand(6, 1, 8, 8, generator=rng.generator(0, "images"))


def test_fresh_masks_differ_at_each_call(defense: Defended) -> None:
    assert not torch.equal(defense(IMAGES), defense(IMAGES))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.to_sparse(), r"images must be dense, got torch.sparse_coo: give images.to_dense\(\)"),
        (torch.nested.nested_tensor([*IMAGES]), r"images must be dense, got a nested tensor: give torch\.stack"),
        (IMAGES.to("meta"), "images are on the meta device, which holds no values"),
    ],
)
def test_images_without_values_in_place(defense: Defended, images: torch.Tensor, message: str) -> None:
    for call in (defense, defense.restore, defense.fixed(0, draws=2)):
        with pytest.raises(ConfigError, match=f"^{message}"):
            call(images)


def test_a_defense_on_the_meta_device_takes_images_there(defense: Defended) -> None:
    made = defense.to("meta").fixed(0)(IMAGES.to("meta"))
    assert (made.device.type, made.shape) == ("meta", (6, 10))


def test_draws_that_are_given_are_those_of_the_defense(defense: Defended) -> None:
    draws = defense.draw(6)
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
            defense(IMAGES, given)
        assert "\n" not in str(refusal.value)
    assert torch.equal(defense(IMAGES, draws), defense.logits(IMAGES, draws))


def test_a_seeded_stream_of_fresh_masks_repeats(defense: Defended) -> None:
    one, other = defense.fresh(seed=1), defense.fresh(seed=1)
    first, again = [one(IMAGES), one(IMAGES)], [other(IMAGES), other(IMAGES)]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("draws", [1, 3])
def test_fixed_masks_make_a_function_of_the_image_alone(defense: Defended, draws: int) -> None:
    fixed = defense.fixed(seed=5, draws=draws)
    whole = fixed(IMAGES)
    assert torch.equal(whole, fixed(IMAGES))
    alone = torch.cat([fixed(IMAGES[i : i + 1]) for i in reversed(range(6))]).flip(0)
    torch.testing.assert_close(alone, whole)
    assert not torch.equal(whole, defense.fixed(seed=6, draws=draws)(IMAGES))


@pytest.mark.parametrize("seed", [None, 1.5, 1.0, "a", True, [0]])
def test_a_seed_is_a_whole_number(seed: Any, defense: Defended) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"seed must be a whole number, got {seed!r}")):
        defense.fixed(seed)
    if seed is not None:
        with pytest.raises(ConfigError, match="seed must be a whole number"):
            defense.fresh(seed)
    fixed = defense.fixed(np.int64(5))  # type: ignore[arg-type]
    assert fixed.is_fixed
    assert torch.equal(fixed(IMAGES), defense.fixed(5)(IMAGES))


def test_logits_are_averaged_over_draws(defense: Defended) -> None:
    averaged = defense.fresh(seed=2, draws=3)(IMAGES)
    single = defense.fresh(seed=2)
    separate = torch.stack([single(IMAGES) for _ in range(3)]).mean(dim=0)
    torch.testing.assert_close(averaged, separate)


def test_averaging_views_of_an_unseeded_defense_draw_each_their_own(defense: Defended) -> None:
    defense = defense.fresh()
    first, second = (defense.averaged(2)(IMAGES) for _ in range(2))
    assert not torch.equal(first, second)
    seeded = defense.fresh(seed=2)
    assert torch.equal(seeded.averaged(2)(IMAGES), seeded.averaged(2)(IMAGES))


def test_views_share_weights_and_change_nothing(defense: Defended) -> None:
    defense = defense.fresh(seed=3)
    same = defense.fresh(seed=3)
    views = [defense.fixed(0), defense.fixed(0).averaged(2), defense.averaged(3), defense.fixed(1).fresh()]
    assert [(view.is_fixed, view.draws) for view in views] == [(True, 1), (True, 2), (False, 3), (False, 1)]
    for view in views:
        view(IMAGES)
        view.register_forward_hook(lambda module, inputs, output: output * 0)
        view.note = torch.nn.Identity()
        assert [*view.parameters()] == [*defense.parameters()]
        assert list(view.state_dict()) == list(defense.state_dict())
    assert (defense.is_fixed, defense.draws, len(list(defense.children()))) == (False, 1, 2)
    assert torch.equal(defense(IMAGES), same(IMAGES))  # no view has drawn from its stream, none has hooked it
    fixed = defense.fixed(0)
    before = fixed(IMAGES)
    with torch.no_grad():
        defense.purifier.head.bias += 1  # the weights are the same ones, not copies
    assert not torch.equal(fixed(IMAGES), before)


def test_modes_come_back_whatever_happens(defense: Defended) -> None:
    defense.train()
    defense.classifier.eval()
    modes = [part.training for part in defense.modules()]

    def fails() -> None:
        with evaluating(defense):
            assert not any(part.training for part in defense.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [part.training for part in defense.modules()] == modes


def test_global_random_state_is_left_alone(defense: Defended) -> None:
    before = torch.random.get_rng_state()
    defense.fresh()(IMAGES)
    defense.fixed(0)(IMAGES)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frozen_gives_back_what_it_took(defense: Defended) -> None:
    defense.classifier.requires_grad_(False)
    asked = [p.requires_grad for p in defense.parameters()]
    with frozen(defense):
        assert not any(p.requires_grad for p in defense.parameters())
    assert [p.requires_grad for p in defense.parameters()] == asked
