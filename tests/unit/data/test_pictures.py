"""What is in a picture arrives, or one line says why not: bits, transparency, orientation, frames, damage."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dircluster.config import ConfigError, DataConfig
from dircluster.data import picture
from dircluster.data.decode import decode
from dircluster.data.picture import Cell

RAMP = np.arange(8, dtype=np.uint8).reshape(2, 4) * 36
"""Gray values 0 to 252."""


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(blob: Any, channels: int = 1, height: int = 2, width: int = 4) -> np.ndarray[Any, Any]:
    found = decode([blob], DataConfig(height=height, width=width, channels=channels))
    return found[0].numpy()


def sixteen(values: Any, mode: str = "I;16") -> Image.Image:
    raw = np.asarray(values).astype(">u2" if mode == "I;16B" else "<u2")
    return Image.frombytes(mode, raw.shape[::-1], raw.tobytes())


def pgm(values: Any) -> bytes:
    return b"P5 4 2 65535\n" + np.asarray(values).astype(">u2").tobytes()


WIDE = RAMP.astype(int) * 257
SAME = {
    "png of 16 bits": encoded(sixteen(WIDE)),
    "tiff of 16 bits": encoded(sixteen(WIDE), "TIFF"),
    "tiff of 16 bits, big endian": encoded(sixteen(WIDE, "I;16B"), "TIFF"),
    "tiff of 16 bits, white is zero": encoded(sixteen(65535 - WIDE), "TIFF", tiffinfo={262: 0}),
    "pgm of 16 bits": pgm(WIDE),
    "tiff of floats": encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
    "palette": encoded(Image.fromarray(RAMP).convert("P")),
    "gif": encoded(Image.fromarray(RAMP), "GIF"),
    "opaque alpha": encoded(Image.fromarray(RAMP).convert("LA")),
    "opaque color and alpha": encoded(Image.fromarray(RAMP).convert("RGBA")),
    "a transparent gray that no pixel has": encoded(Image.fromarray(RAMP), transparency=5),
    "webp": encoded(Image.fromarray(RAMP), "WEBP", lossless=True),
    "tga": encoded(Image.fromarray(RAMP), "TGA"),
    "jpeg 2000": encoded(Image.fromarray(RAMP), "JPEG2000"),
    "one page of a tiff": encoded(Image.fromarray(RAMP), "TIFF", save_all=True),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SAME)
def test_gray_is_the_same_however_it_is_stored(name: str, channels: int) -> None:
    assert np.array_equal(read(SAME[name], channels), np.stack([RAMP] * channels))


def test_values_between_are_rounded() -> None:
    values = np.array([[0, 128, 129, 32767, 32768, 65406, 65407, 65535]])
    assert read(encoded(sixteen(values)), 1, 1, 8).flatten().tolist() == [0, 0, 1, 127, 128, 254, 255, 255]
    floats = np.array([[0, 0.0019, 0.002, 0.5, 1]], np.float32)
    assert read(encoded(Image.fromarray(floats), "TIFF"), 1, 1, 5).flatten().tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(orientation: int, kind: str) -> None:
    upright = np.array([[255, 0, 0], [255, 255, 0]], np.uint8).repeat(8, 0).repeat(8, 1)  # 16 x 24
    back = {  # what a camera stores, so that the orientation brings it upright
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }.get(orientation, upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    found = read(encoded(Image.fromarray(np.ascontiguousarray(back)), kind, exif=exif, **options), 1, 16, 24)[0]
    assert np.abs(found.astype(int) - upright).max() <= 3


def glyph(mode: str) -> Image.Image:
    """Black ink of which the alpha channel alone knows where it is."""
    ink = Image.fromarray(RAMP)
    made = Image.new(mode[:-1], (4, 2))
    made.putalpha(ink)
    return made


def transparent_palette() -> bytes:
    return encoded(Image.fromarray(RAMP).convert("P"), transparency=0)


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def signed(values: Any) -> bytes:
    """A gray TIFF of signed bytes (SampleFormat 2)."""
    return encoded(Image.fromarray(np.asarray(values).astype(np.int8).view(np.uint8)), "TIFF", tiffinfo={339: 2})


HUGE = b"P5 20000 10000 255\n"
REFUSED = {
    "alpha": (encoded(glyph("RGBA")), "transparent pixels"),
    "gray and alpha": (encoded(glyph("LA")), "transparent pixels"),
    "transparent color": (encoded(Image.fromarray(RAMP).convert("RGB"), transparency=(36, 36, 36)), "transparent"),
    "transparent gray": (encoded(Image.fromarray(RAMP), transparency=36), "transparent pixels"),
    "transparent palette": (transparent_palette(), "transparent pixels"),
    "transparent gif": (encoded(Image.fromarray(RAMP), "GIF", transparency=0), "transparent pixels"),
    "animated gif": (animation("GIF"), "holds 2 frames"),
    "animated png": (animation("PNG"), "holds 2 frames"),
    "animated webp": (animation("WEBP"), "holds 2 frames"),
    "pages": (animation("TIFF"), "holds 2 frames"),
    "signed bytes": (signed(RAMP.astype(int) - 128), "integers are signed"),
    "signed bytes from 0 on": (signed(RAMP // 2), "integers are signed"),
    "integers of 32 bits": (encoded(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), "32 bits"),
    "floats to 255": (encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floats reach from 0 to 252"),
    "floats below 0": (encoded(Image.fromarray(RAMP / np.float32(255) - 1), "TIFF"), "floats reach from -1"),
    "no number": (encoded(Image.fromarray(RAMP * np.float32("nan")), "TIFF"), "floats reach from nan"),
    "8 bits in 16": (encoded(sixteen(RAMP)), "values up to 252 alone"),
    "12 bits in 16": (encoded(sixteen(RAMP.astype(int) * 16)), "values up to 4032 alone, nearly black; save it"),
    "12 bits in a tiff of 16": (encoded(sixteen(RAMP.astype(int) * 16), "TIFF"), "values up to 4032 alone"),
    "icon of two sizes": (encoded(Image.new("L", (4, 2), 9), "ICO", sizes=[(4, 2), (2, 1)]), "format that is read"),
    "postscript": (encoded(Image.fromarray(RAMP), "EPS"), "format that is read"),
    "a fourth band": (encoded(Image.frombytes("RGBX", (4, 2), bytes(32)), "TIFF"), "bands beyond its colors"),
    "200 megapixels": (HUGE, "pixels"),
    "nothing": (b"", "no bytes"),
    "null": (None, "no bytes"),
    "text": (b"images/0001.png", "are no PNG, JPEG"),
    "raw pixels": (RAMP.tobytes(), "its 8 bytes are no PNG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_need_a_guess_is_one_line_with_its_row(name: str) -> None:
    content, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as refusal:
        read(Cell(content, Path("train.parquet"), 17))
    assert str(refusal.value).startswith("train.parquet, row 17: an image cannot be read: ")
    assert "\n" not in str(refusal.value)
    assert " at 0x" not in str(refusal.value)


ALONE = {
    "png": encoded(Image.fromarray(RAMP)),
    "gif": encoded(Image.fromarray(RAMP), "GIF"),
    "bits as text": b"P1 4 2\n1 0 1 0\n0 1 0 1\n",
    "gray as text": b"P2 4 2 255\n" + b" 9" * 8 + b"\n",
    "bits": b"P4 4 2\n" + bytes(2),
    "gray": b"P5 4 2 255\n" + RAMP.tobytes(),
    "gray of few levels": b"P5 4 2 100\n" + bytes(range(8)),
    "gray of 16 bits": pgm(WIDE),
    "gray of 12 bits": b"P5 4 2 4095\n" + (RAMP.astype(int) * 16).astype(">u2").tobytes(),
    "color": b"P6 4 2 255\n" + RAMP.repeat(3).tobytes(),
    "color of 16 bits": b"P6 4 2 65535\n" + WIDE.repeat(3).astype(">u2").tobytes(),
    "floats": b"Pf\n4 2\n-1.0\n" + bytes(32),
}


@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.parametrize("between", [b"", b"\n"])
def test_a_second_image_behind_the_first_is_refused(kind: str, between: bytes) -> None:
    one = ALONE[kind]
    for alone in (one, one + b"\n", one + b"\n# made by P5"):
        read(alone)
    with pytest.raises(ConfigError, match="another image follows in it; store the one that counts"):
        read(one + between + one)


def test_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(SAME["webp"][:30])
    with pytest.raises(ConfigError, match=r"cut\.png: an image cannot be read"):
        read(tmp_path / "cut.png")


def test_no_flipped_byte_of_a_png_changes_a_pixel_in_silence() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise))
    expected, refused = read(whole, 1, 8, 8), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        try:
            assert np.array_equal(read(bytes(damaged), 1, 8, 8), expected)
        except ConfigError:
            refused += 1
    assert refused > 0.9 * len(whole)


def test_resizing_comes_after_turning_and_scaling() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    half = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 8, 0).repeat(16, 1))  # black over white
    config = DataConfig(height=4, width=4, channels=1, resize=True)
    turned = decode([encoded(half, "PNG", exif=exif)], config)[0, 0]
    assert (turned == turned[0]).all()  # white left of black
    assert (turned[0, 0], turned[0, 3]) == (255, 0)


@pytest.mark.parametrize(("height", "width"), [(4, 8), (8, 4), (2, 4), (6, 6)])
def test_resizing_cuts_the_middle_part_of_the_wanted_shape(height: int, width: int) -> None:
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    made = decode([encoded(Image.fromarray(image), "PNG")], DataConfig(height=height, width=width, resize=True))[0, 0]
    assert made.shape == (height, width)
    scale = 8 / max(height, width)
    top, left = (round((8 - scale * side) / 2) for side in (height, width))
    kept = image[top : 8 - top, left : 8 - left]
    assert made.float().mean() == pytest.approx(kept.mean(), abs=0.5)
    assert kept.min() <= made.min() <= made.max() <= kept.max()
    assert scale > 1 or (made.numpy() == kept).all()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (14_500, r"a.parquet, row 3: an image cannot be read: it has more than 178,956,970 pixels"),
        (10_000, r"a.parquet, row 3: an image cannot be read: .*truncated"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_picture_of_many_megapixels_is_read_or_named(side: int, message: str) -> None:
    picture._quiet_of_size.cache_clear()  # what it has set is undone after each test
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9)))
    with pytest.raises(ConfigError, match=message):
        read(Cell(content, Path("a.parquet"), 3))


def wide_png(values: Any, kind: int) -> bytes:
    """Gray ``values`` of 16 bits as a PNG of color type ``kind``: 2 color, 4 gray and alpha, 6 color and alpha."""
    gray = np.asarray(values)
    opaque = [np.full_like(gray, 65535)] * (kind > 3)
    rows = np.stack([*[gray] * (1 if kind == 4 else 3), *opaque], -1).astype(">u2")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", gray.shape[1], gray.shape[0], 16, kind, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b"")


def wide_tiff(values: Any, order: str) -> bytes:
    """The same as an uncompressed color TIFF, whose bytes are in ``order``: < or >."""
    gray = np.asarray(values)
    height, width = gray.shape
    content = np.stack([gray] * 3, -1).astype(f"{order}u2").tobytes()
    sizes, start = 8 + 2 + 9 * 12 + 4, 8 + 2 + 9 * 12 + 4 + 6
    tags = ((256, 1, width), (257, 1, height), (258, 3, sizes), (259, 1, 1), (262, 1, 2), (273, 1, start), (277, 1, 3))
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4 if count == 1 else 3, count, of) for tag, count, of in tags)
    entries += struct.pack(f"{order}HHII", 278, 4, 1, height) + struct.pack(f"{order}HHII", 279, 4, 1, len(content))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", 9) + entries + bytes(4) + struct.pack(f"{order}3H", 16, 16, 16) + content


COLORS: dict[str, Any] = {
    "png of color": lambda values: wide_png(values, 2),
    "png of gray and alpha": lambda values: wide_png(values, 4),
    "png of color and alpha": lambda values: wide_png(values, 6),
    "tiff, little endian": lambda values: wide_tiff(values, "<"),
    "tiff, big endian": lambda values: wide_tiff(values, ">"),
}


@pytest.mark.parametrize("name", COLORS)
def test_colors_of_16_bits_are_as_wide_as_they_say(name: str) -> None:
    make = COLORS[name]
    assert np.array_equal(read(make(WIDE), 3), np.stack([RAMP] * 3))
    assert not read(make(0 * WIDE), 3).any()
    assert read(make(WIDE // 257 * 17), 3).max() == 252 * 17 >> 8  # white is 4284: dark, but of more than 12 bits
    for factor, highest in ((1, 252), (16, 4032)):
        with pytest.raises(ConfigError, match=f"its 16 bits hold values up to {highest} alone, nearly black"):
            read(make(RAMP.astype(int) * factor), 3)
