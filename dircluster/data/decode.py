"""Encoded images and the columns of a parquet table as tensors and lists."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dircluster.config import ConfigError, DataConfig, first_line

LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")


Blob = bytes | Path | None
"""An encoded image, or the file that holds it."""


def decode(blobs: Iterable[Blob], config: DataConfig) -> Tensor:
    """Encoded images as (n, C, H, W) uint8; with ``data.resize`` their middle squares, brought to size.

    Raises ConfigError where one cannot be read or sizes differ.
    """
    given, threads = list(blobs), os.cpu_count() or 1
    size = max(1, min(256, len(given) // (4 * threads)))  # a task costs Python as much as a small image does
    parts = [given[start : start + size] for start in range(0, len(given), size)]
    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(lambda part: [_pixels(blob, config) for blob in part], parts)
        images = [image for part in decoded for image in part]
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:3])
        raise ConfigError(
            f"the images have {len(sizes)} different sizes ({some}, ...); bring them to one: --data.resize"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _pixels(blob: Blob, config: DataConfig) -> np.ndarray[Any, Any]:
    """An image as (H, W, C) uint8. Raises ConfigError where it cannot be read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    mode, size = "L" if config.channels == 1 else "RGB", (config.width, config.height)
    try:
        encoded = blob.read_bytes() if isinstance(blob, Path) else blob or b""
        with Image.open(io.BytesIO(encoded)) as image:
            made = image if image.mode == mode else image.convert(mode)
            made = ImageOps.fit(made, size, Image.Resampling.BILINEAR) if config.resize else made
            return np.frombuffer(made.tobytes(), np.uint8).reshape(made.height, made.width, -1)
    except (UnidentifiedImageError, OSError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"an image cannot be read: {first_line(error)}") from error


def columns(table: Any, source: Path) -> tuple[list[bytes], list[int]]:
    """Encoded images and labels of a parquet table. Raises ConfigError where ``source`` has no such columns."""
    import pyarrow as pa

    kinds = {column.name: column.type for column in table.schema}
    label = next((name for name in LABEL_COLUMNS if name in kinds), None)
    if label is None or not pa.types.is_integer(kinds[label]):
        raise ConfigError(f"{source} has no integer column {' or '.join(LABEL_COLUMNS)}; columns: {list(kinds)}")
    images = [
        name
        for name, kind in kinds.items()
        if pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
    ]
    if not images:
        raise ConfigError(f"{source} has no column of image bytes; columns: {list(kinds)}")
    cells = table.column(images[0]).to_pylist()
    blobs = [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
    labels = table.column(label)
    if labels.null_count:
        raise ConfigError(f"{source} has {labels.null_count} rows without a label")
    return blobs, labels.to_pylist()
