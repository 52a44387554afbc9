"""What the defense does to images, as one picture."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
