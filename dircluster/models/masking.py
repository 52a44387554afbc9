"""Complementary masks: which patches each of the K masks of an image keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from dircluster.presets.dir import MaskingConfig


def complementary_masks(permutations: Tensor, masking: MaskingConfig) -> Tensor:
    """Kept patches of each mask: cyclic windows of a permutation, starting every T/K places.

    (N, T) int64 -> (K, N, n) int64 with n = round((1 - ratio) T). At ratio 1/2 and K = 2 the two masks are exact
    complements (Section 3.3). Raises ConfigError where a patch would be kept by no mask.
    """
    tokens = int(permutations.shape[1])  # in a trace it is a tensor
    masking.check(tokens)
    kept, count = masking.kept(tokens), masking.masks
    starts = torch.arange(count, device=permutations.device) * tokens // count
    positions = (starts[:, None] + torch.arange(kept, device=permutations.device)) % tokens
    return permutations[:, positions].transpose(0, 1).contiguous()


def random_permutations(generator: torch.Generator, images: int, tokens: int) -> Tensor:
    """A random order of the patches for each image: -> (images, tokens) int64, on the generator's device."""
    keys = torch.rand((images, tokens), generator=generator, dtype=torch.float64, device=generator.device)
    return keys.argsort(dim=1)


def pixel_mask(kept: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Kept patches as images, 1 where kept and 0 where discarded: (K, N, n) -> (K, N, 1, H, W)."""
    count, images, _ = kept.shape
    rows, columns = height // patch, width // patch
    grid = torch.zeros(count, images, rows * columns, device=kept.device).scatter_(2, kept, 1.0)
    grid = grid.view(count, images, 1, rows, columns)
    return grid.repeat_interleave(patch, dim=3).repeat_interleave(patch, dim=4)
