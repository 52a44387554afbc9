"""Encoded images as tensors, decoded by all cores."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dircluster.config import ConfigError, DataConfig
from dircluster.cores import cores
from dircluster.data.picture import Blob, check_shape, pixels


def decode(blobs: Iterable[Blob], config: DataConfig) -> Tensor:
    """Encoded images as (n, C, H, W) uint8; with ``data.resize`` their middle parts of that shape, brought to size.

    Raises ConfigError where one cannot be read, or sizes differ or are others than ``config`` says.
    """
    given, threads = list(blobs), cores()
    size = max(1, min(256, len(given) // (4 * threads)))  # a task costs Python as much as a small image does
    parts = [given[start : start + size] for start in range(0, len(given), size)]
    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(lambda part: [pixels(blob, config) for blob in part], parts)
        images = [image for part in decoded for image in part]
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:3])
        raise ConfigError(
            f"the images have {len(sizes)} different sizes ({some}, ...); bring them to one: --data.resize"
        )
    made = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    check_shape(tuple(made.shape[1:]), config)
    return made
