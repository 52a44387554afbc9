"""Pictures that say by their gray which they are."""

from __future__ import annotations

import io

from PIL import Image


def png(value: int = 7, side: int = 4) -> bytes:
    """A square of one gray (0 to 255) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), value).save(buffer, "PNG")
    return buffer.getvalue()
