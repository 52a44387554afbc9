"""Images are decoded to the bytes that Pillow gives, in their order, and only those that are used."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dircluster.config import ConfigError, DataConfig
from dircluster.data import sources
from dircluster.data.decode import decode
from dircluster.data.sources import load
from tests.pictures import png

PIXELS = torch.randint(256, (9, 7, 4), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint8)


def stored(mode: str, kind: str = "PNG", **options: Any) -> bytes:
    made = Image.fromarray(PIXELS, "RGBA").convert("RGB").convert(mode)
    buffer = io.BytesIO()
    made.save(buffer, format=kind, **options)
    return buffer.getvalue()


IMAGES = {
    "color": stored("RGB"),
    "gray": stored("L"),
    "palette": stored("P"),
    "one bit": stored("1"),
    "a transparent color that no pixel has": stored("RGB", transparency=(1, 2, 3)),
    "print colors": stored("CMYK", "TIFF"),
    "video colors": stored("YCbCr", "TIFF"),
    "jpeg": stored("RGB", "JPEG"),
    "bmp": stored("RGB", "BMP"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_are_those_of_pillow(name: str, channels: int) -> None:
    found = decode([IMAGES[name]] * 3, DataConfig(height=9, width=7, channels=channels))
    with Image.open(io.BytesIO(IMAGES[name])) as image:
        expected = np.array(image.convert("L" if channels == 1 else "RGB")).reshape(9, 7, channels)
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1).expand(3, -1, -1, -1))
    assert found.dtype == torch.uint8
    assert found.is_contiguous()


@pytest.mark.parametrize("damage", [lambda blob: blob[:60], lambda blob: blob[:45] + b"x" + blob[46:]])
def test_a_damaged_image_is_one_line(damage: Any) -> None:
    with pytest.raises(ConfigError, match="an image cannot be read") as refusal:
        decode([damage(IMAGES["color"])], DataConfig(channels=3))
    assert "\n" not in str(refusal.value)


def test_many_images_keep_their_order() -> None:
    blobs = [png(value, side=2) for value in range(200)]
    assert decode(blobs * 4, DataConfig(height=2, width=2, channels=1))[:, 0, 0, 0].tolist() == list(range(200)) * 4


@pytest.mark.parametrize("own_test", [False, True])
def test_what_a_limit_leaves_out_is_not_decoded_and_the_images_are_those_of_before(
    tmp_path: Path, own_test: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, count in (("train", 60), *((("test", 40),) if own_test else ())):
        blobs = [png(value) for value in range(count)]
        labels = [value % 10 for value in range(count)]
        pq.write_table(pa.table({"image": blobs, "label": labels}), tmp_path / f"{split}.parquet")
    asked: list[int] = []
    inner = sources.decode
    monkeypatch.setattr(sources, "decode", lambda blobs, config: (asked.append(len(blobs)), inner(blobs, config))[1])
    config: dict[str, Any] = {"name": "custom", "uri": str(tmp_path), "height": 4, "width": 4}
    some, whole = load(DataConfig(**config, limit=10), 0), load(DataConfig(**config), 0)
    assert asked[:2] == [10, 10]
    assert len(some.train) + len(some.held_out) == len(some.test) == 10
    assert torch.equal(some.test.images, whole.test.images[:10])
    assert torch.equal(some.test.labels, some.test.images[:, 0, 0, 0] % 10)
    used = torch.cat([some.train.images, some.held_out.images])[:, 0, 0, 0].sort().values
    order = list(range(60)) if own_test else [v for v in _order(60) if v not in whole.test.images[:, 0, 0, 0].tolist()]
    assert used.tolist() == sorted(order[:10])


def _order(images: int) -> list[int]:
    from dircluster import rng

    order: list[int] = torch.randperm(images, generator=rng.generator(0, "test_split")).tolist()
    return order


def test_labels_that_a_limit_leaves_out_are_checked_too(tmp_path: Path) -> None:
    labels = [0] * 30 + [12]
    pq.write_table(pa.table({"image": [stored("L")] * 31, "label": labels}), tmp_path / "train.parquet")
    with pytest.raises(ConfigError, match="labels reach from 0 to 12"):
        load(DataConfig(name="custom", uri=str(tmp_path), height=9, width=7, limit=10), 0)
