"""Images as pictures: what a defense does to some, many on one sheet, and the few that an outcome keeps."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PICTURED, MOST_PIXELS = 500, 1_000_000
"""Images of an evaluation whose pictures are kept, and fewer where so many would have more pixels."""


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


def as_bytes(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as pictures hold them, uint8: cut to [0, 1], what is not a number black."""
    found: Tensor = (images.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().cpu()
    return found


def pictured(height: int, width: int) -> int:
    """How many images of this size are kept as pictures."""
    return min(PICTURED, MOST_PIXELS // (height * width))


def kept_pictures(images: Tensor, start: int) -> dict[str, Any] | None:
    """Those of ``images`` (N, C, H, W), numbered from ``start``, that are kept, for JSON; None where none are."""
    few = as_bytes(images[: max(0, pictured(*images.shape[2:]) - start)])
    if len(few) == 0:
        return None
    return {"shape": list(few.shape), "zlib": base64.b64encode(zlib.compress(few.numpy().tobytes())).decode()}


def read_pictures(kept: dict[str, Any]) -> Tensor:
    """The inverse of :func:`kept_pictures`: -> (n, C, H, W) uint8."""
    blob = bytearray(zlib.decompress(base64.b64decode(kept["zlib"])))
    return torch.frombuffer(blob, dtype=torch.uint8).reshape(kept["shape"])


def data_uri(png: bytes) -> str:
    """A PNG as an address that holds it, so that a page stands alone."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def to_sheet(pictures: Tensor, columns: int) -> str:
    """Pictures (N, C, H, W) uint8 in rows of ``columns``, as one PNG in a data URI."""
    from PIL import Image

    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    padded = torch.cat([pictures, pictures.new_zeros(rows * columns - count, channels, height, width)])
    grid = padded.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    pixels = grid.reshape(rows * height, columns * width, channels)
    pixels = pixels[..., 0] if channels == 1 else pixels[..., :3]
    held = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(held, format="PNG")
    return data_uri(held.getvalue())
