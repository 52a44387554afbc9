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


def decode(blobs: Iterable[bytes | Path | None], config: DataConfig) -> Tensor:
    """Encoded images as (n, C, H, W) uint8; with ``data.resize`` their middle squares, brought to size.

    Raises ConfigError where one cannot be read or sizes differ.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    mode, size = "L" if config.channels == 1 else "RGB", (config.width, config.height)

    def one(blob: bytes | Path | None) -> np.ndarray[Any, Any]:
        try:
            with Image.open(
                io.BytesIO((blob or b"") if isinstance(blob, bytes | None) else blob.read_bytes())
            ) as image:
                converted = image.convert(mode)
                return np.asarray(
                    ImageOps.fit(converted, size, Image.Resampling.BILINEAR) if config.resize else converted
                )
        except (UnidentifiedImageError, OSError, TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"an image cannot be read: {first_line(error)}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(one, blobs, chunksize=256))
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        some = ", ".join(f"{h}x{w}" for h, w in sorted(sizes)[:3])
        raise ConfigError(
            f"the images have {len(sizes)} different sizes ({some}, ...); bring them to one: --data.resize"
        )
    stacked = torch.from_numpy(np.stack(images))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()


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
