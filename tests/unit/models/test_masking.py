"""Complementary masks."""

from __future__ import annotations

import pytest
import torch

from dircluster.config import ConfigError
from dircluster.models.masking import complementary_masks, pixel_mask, random_permutations
from dircluster.presets.dir import MaskingConfig


def test_two_halves_are_exact_complements() -> None:
    kept = complementary_masks(random_permutations(torch.Generator().manual_seed(0), 50, 256), MaskingConfig())
    assert kept.shape == (2, 50, 128)
    both = torch.cat([kept[0], kept[1]], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(256).expand(50, -1))


def test_windows_start_every_t_over_k_places_and_wrap() -> None:
    kept = complementary_masks(torch.arange(10)[None], MaskingConfig(ratio=0.6, count=3))
    assert kept[:, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    kept = complementary_masks(torch.arange(10)[None], MaskingConfig(ratio=0.5, count=3))
    assert kept[2, 0].tolist() == [6, 7, 8, 9, 0]


def test_images_have_masks_of_their_own_and_the_generator_decides() -> None:
    kept = complementary_masks(random_permutations(torch.Generator().manual_seed(1), 8, 64), MaskingConfig())
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert torch.equal(
        kept, complementary_masks(random_permutations(torch.Generator().manual_seed(1), 8, 64), MaskingConfig())
    )


def test_an_uncovered_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves patches unseen"):
        complementary_masks(random_permutations(torch.Generator(), 1, 9), MaskingConfig(ratio=0.5, count=2))


def test_pixels_of_a_mask() -> None:
    mask = pixel_mask(torch.tensor([[[0, 3]]]), 4, 4, 2)
    assert mask[0, 0, 0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
