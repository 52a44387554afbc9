"""What the defence does to images, as one picture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dircluster.attacks.gradient import pgd
from dircluster.config import RunConfig
from dircluster.data.sources import Split
from dircluster.evaluation.selection import Judge
from dircluster.models.masking import pixel_mask
from dircluster.recipes.base import Recipe, crafting
from dircluster.training.parallel import Parallel

ROWS = ("natural", "adversarial", "masked", "restored", "difference")
"""Rows of :func:`restoration_grid`, from top to bottom; difference is restored minus natural, around mid-grey."""


def restoration_grid(recipe: Recipe, split: Split, config: RunConfig, device: torch.device, images: int = 8) -> Tensor:
    """Held-out images through the pipeline, one a column, in [0, 1]: -> (len(ROWS), n, C, H, W)."""
    judge = Judge(split.take(slice(images)), config, Parallel(0, 1, device), "pictures", images)
    rows = torch.arange(len(judge.split))
    natural, labels = judge.batch(rows)
    kept = judge.masks(rows)
    with crafting(recipe):
        adversarial = pgd(
            lambda x: recipe.predict(x, kept),
            natural,
            labels,
            judge.threat,
            config.attack.steps,
            judge.step_size,
            judge.start(rows),
        )
        with torch.no_grad():
            restored = recipe.restore(adversarial, kept)
    masked = adversarial * pixel_mask(kept, config.data.height, config.data.width, config.model.patch)[0]
    moved = restored - natural
    difference = 0.5 + moved / (2 * moved.abs().amax().clamp_min(1.0))  # restored images may leave [0, 1]
    return torch.stack([natural, adversarial, masked, restored, difference]).clamp(0, 1).cpu()


def to_pixels(grid: Tensor, smallest: int = 64) -> NDArray[np.uint8]:
    """A grid of images as one, enlarged by whole factors to at least ``smallest`` pixels an image.

    (rows, columns, C, H, W) in [0, 1] -> (height, width, 3) uint8.
    """
    rows, columns, channels, height, _ = grid.shape
    factor = max(1, smallest // height)
    large = grid.repeat_interleave(factor, dim=3).repeat_interleave(factor, dim=4)
    framed = torch.nn.functional.pad(large, (1, 1, 1, 1), value=1.0)
    sheet = framed.permute(0, 3, 1, 4, 2).reshape(rows * framed.shape[3], columns * framed.shape[4], channels)
    pixels: NDArray[np.uint8] = (sheet.expand(-1, -1, 3) * 255).round().byte().numpy()
    return pixels
