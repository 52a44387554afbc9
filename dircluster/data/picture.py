"""One encoded image as pixels: its right ones, or one line that names the file or row. It knows no torch."""

from __future__ import annotations

import functools
import io
import re
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dircluster.config import ConfigError, DataConfig, first_line


class Cell(NamedTuple):
    """An encoded image in a row of a parquet file."""

    content: bytes | None
    file: Path
    row: int


Blob = bytes | Path | Cell | None
"""An encoded image, or the file that holds it."""
Pixels = np.ndarray[Any, Any]

FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TIFF", "PPM", "JPEG2000", "TGA", "QOI")
"""Formats that are read, as Pillow calls them. Of others it takes one size of several (ICO), drops a scale that the
header says (FITS), or starts a program (EPS)."""

TURNED = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What brings an image upright, by the orientation that its EXIF says."""


def check_shape(found: tuple[int, ...], config: DataConfig) -> None:
    """Raise ConfigError where images of ``found``, (C, H, W), are not of the size that ``config`` says."""
    wanted = (config.channels, config.height, config.width)
    if found != wanted:
        raise ConfigError(
            f"the images are {'x'.join(map(str, found))} (channels x height x width), but data says"
            f" {'x'.join(map(str, wanted))}; set data.channels, data.height and data.width"
        )


def loses_color(blob: Blob, config: DataConfig) -> bool:
    """Whether an image that is read as gray has colors, but for what JPEG makes of gray. Raises ConfigError."""
    if config.channels != 1:
        return False
    colors = pixels(blob, replace(config, channels=3)).astype(int)
    return bool(np.ptp(colors, axis=2).max() > 8)


def pixels(blob: Blob, config: DataConfig) -> Pixels:
    """An image as (H, W, C) uint8. Raises ConfigError where it cannot be read, or not without a guess."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    mode, size = "L" if config.channels == 1 else "RGB", (config.width, config.height)
    try:
        encoded = _encoded(blob)
        _check_png(encoded)
        _quiet_of_size()
        with Image.open(io.BytesIO(encoded), formats=_known_formats()) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a photo's MPO holds previews of it
                raise ConfigError(f"it holds {frames} frames or pages; store the one that counts")
            _check_alone(image, encoded)
            _check_colors(image, encoded)
            image.load()
            made = _upright(_in_eight_bits(image), image)
            if made.mode != mode:
                made = (made.convert("RGB") if made.mode == "LAB" else made).convert(mode)
            made = ImageOps.fit(made, size, Image.Resampling.BILINEAR) if config.resize else made
            return np.frombuffer(made.tobytes(), np.uint8).reshape(made.height, made.width, -1)
    except Image.DecompressionBombError as error:
        raise ConfigError(
            f"{_where(blob)}an image cannot be read: it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels,"
            " which may be an attack on memory; make it smaller first"
        ) from error
    except UnidentifiedImageError as error:
        raise ConfigError(
            f"{_where(blob)}an image cannot be read: its {len(encoded)} bytes are no PNG, JPEG or other image format"
            f" that is read ({', '.join(_known_formats())})"
        ) from error
    except Exception as error:  # damaged bytes make Pillow raise nearly anything
        raise ConfigError(f"{_where(blob)}an image cannot be read: {first_line(error)}") from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


@functools.cache
def _quiet_of_size() -> None:
    """Pillow warns of images beyond 90 megapixels: they are read, and the warning would name neither file nor row."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _where(blob: Blob) -> str:
    if isinstance(blob, Cell):
        return f"{blob.file}, row {blob.row}: "
    return f"{blob}: " if isinstance(blob, Path) else ""


def _encoded(blob: Blob) -> bytes:
    content = blob.content if isinstance(blob, Cell) else blob
    encoded = content.read_bytes() if isinstance(content, Path) else content
    if not encoded:
        raise ConfigError("there are no bytes of it" + (" in the table" if isinstance(blob, Cell) else ""))
    return encoded


def _check_png(encoded: bytes) -> None:
    """Raise ConfigError where a chunk of a PNG is not what its checksum says: Pillow ignores that of pixels."""
    start = 8
    while encoded[:4] == b"\x89PNG" and start + 12 <= len(encoded):
        end = start + 8 + int.from_bytes(encoded[start : start + 4], "big")
        kind = encoded[start + 4 : start + 8]
        if end + 4 <= len(encoded) and zlib.crc32(encoded[start + 4 : end]) != int.from_bytes(
            encoded[end : end + 4], "big"
        ):
            raise ConfigError("it is damaged: a checksum is wrong")
        start = len(encoded) if kind == b"IEND" else end + 4


_SECOND = {
    "PNG": rb"IEND\xaeB`\x82\s*\x89PNG",
    "GIF": rb"\x00;\s*GIF8",
    "plain PPM": rb"\n\s*P[1-3]\s",
}
"""The end of an image with the beginning of another, by format."""


def _check_alone(image: Any, encoded: bytes) -> None:
    """Raise ConfigError where another image follows in a PNG, GIF, PBM, PGM, PPM or PFM: Pillow reads the first alone.

    Behind a JPEG there often are previews, or a film.
    """
    plain = image.format == "PPM" and image.tile[0].codec_name == "ppm_plain"
    pattern = _SECOND.get("plain PPM" if plain else image.format)
    if pattern and re.search(pattern, encoded):
        raise ConfigError("another image follows in it; store the one that counts")
    if plain or image.format != "PPM":
        return
    codec, _, start, given = image.tile[0]
    wide = codec == "ppm" and given[1] > 255
    values = image.width * len(image.getbands())
    row = (values + 7) // 8 if image.mode == "1" else values * {"I": 2, "F": 4}.get(image.mode, 1 + wide)
    if re.match(rb"\s*P[1-7Ff]\s", encoded[start + row * image.height :]):
        raise ConfigError("another image follows in it; store the one that counts")


def _in_eight_bits(image: Any) -> Any:
    """The image in a mode of 8 bits without transparency. Raises ConfigError where that needs a guess."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    if 0 in tags.get(338, ()):  # which Pillow leaves out
        raise ConfigError("it has bands beyond its colors, and nothing says of what; save the ones that count")
    signed = 2 in tags.get(339, ())  # which Pillow reads as unsigned where they have 8 bits
    if signed or (image.mode == "I" and image.format != "PPM"):
        raise ConfigError("its integers are signed or of 32 bits, and nothing says which is white; save it with 8 bits")
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_scaled(image))
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
        raise ConfigError("it has transparent pixels; put it on the background that it is to have")
    return image


def _scaled(image: Any) -> Pixels:
    """Gray of 16 bits, or floats from 0 to 1, as (H, W) uint8."""
    pixels, tags = np.asarray(image), getattr(image, "tag_v2", {})
    inverted = tags.get(262) == 0  # white is zero
    if "transparency" in image.info:
        raise ConfigError("it has a transparent color in more than 8 bits; save it with 8")
    if image.mode == "F":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
            raise ConfigError(
                f"its floats reach from {pixels.min():g} to {pixels.max():g}, not 0 to 1; save it with 8 bits"
            )
        return np.round(255 * (1 - pixels if inverted else pixels)).astype(np.uint8)
    white = 4095 if tags.get(258) == (12,) else 65535
    if white > 4095:
        _check_range(int(pixels.max()))
    levels = pixels.astype(np.int64)
    levels = white - levels if inverted else levels
    return ((levels * 255 + white // 2) // white).astype(np.uint8)


def _check_range(highest: int) -> None:
    """Raise ConfigError where an image of 16 bits has values of 12 bits or fewer: its white is not 65535."""
    if 0 < highest <= 4095:
        raise ConfigError(f"its 16 bits hold values up to {highest} alone, nearly black; save it with 8 bits")


_LOW_BYTES: dict[str, tuple[str, slice]] = {
    "RGB;16B": ("RGB;16L", slice(0, 3)),
    "RGB;16L": ("RGB;16B", slice(0, 3)),
    "RGB;16N": ("RGB;16B" if sys.byteorder == "little" else "RGB;16L", slice(0, 3)),
    "RGBA;16B": ("RGBA;16L", slice(0, 3)),
    "RGBA;16L": ("RGBA;16B", slice(0, 3)),
    "RGBA;16N": ("RGBA;16B" if sys.byteorder == "little" else "RGBA;16L", slice(0, 3)),
    "LA;16B": ("RGBA", slice(1, 2)),  # its four bytes as they lie there
}
"""How Pillow unpacks 16 bits a color, of which it keeps the high byte; how it unpacks the low ones, and where to."""


def _check_colors(image: Any, encoded: bytes) -> None:
    """Raise ConfigError where colors of 16 bits have values of 12 bits or fewer, as gray does in ``_scaled``."""
    from PIL import Image

    given: Any = image.tile[0].args if image.tile else None  # how the pixels are packed, alone or first of several
    known = _LOW_BYTES.get(given[0] if isinstance(given, tuple) and given else given)
    if known is None:
        return
    image.load()
    high = np.asarray(image)[..., :3].astype(np.int64)
    if high.max() > 15:
        return
    unpacked, bands = known
    with Image.open(io.BytesIO(encoded)) as again:
        again.tile = [
            tile._replace(args=(unpacked, *tile.args[1:]) if isinstance(tile.args, tuple) else unpacked)
            for tile in again.tile
        ]
        again.load()
        _check_range(int((256 * high + np.asarray(again)[..., bands]).max()))


def _upright(made: Any, image: Any) -> Any:
    """``made`` turned as the EXIF of ``image`` says; Pillow has turned a TIFF already."""
    from PIL import Image

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # an EXIF that cannot be read says nothing, to any viewer
        return made
    turn = TURNED.get(orientation)
    return made.transpose(Image.Transpose[turn]) if turn else made
