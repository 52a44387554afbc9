"""Random crops and flips, by the draws of a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster import rng


def crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Zero-pad and cut back to size at ``offsets`` (n, 2) in [0, 2 padding]: (n, C, H, W) -> (n, C, H, W)."""
    n, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    image = torch.arange(n, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def augmented(images: Tensor, stream: rng.Stream, crop_padding: int, flip: bool) -> Tensor:
    """Random crops and flips by the draws of a step: (n, C, H, W) -> (n, C, H, W)."""
    if crop_padding:
        places = 2 * crop_padding + 1
        images = crop(images, (stream.uniform("crop", (2,)) * places).long(), crop_padding)
    if flip:
        mirrored = stream.uniform("flip", (1, 1, 1)) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images
