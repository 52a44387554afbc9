"""A labeled image set of 256 x 256 tiles cut from the two photographs in scikit-learn's wheel, as parquet shards.

    python infra/photo_shards.py FOLDER

Real pixels at ImageNet's size without a download, to see that streaming works; no task to learn anything from.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch

from dircluster import rng

SIDE, SHARDS, GROUPS, ROWS = 256, 4, 3, 8
"""Pixels of a tile; shards, row groups a shard and rows a group of the training split."""
TEST_ROWS = 32


def write_photos(folder: Path) -> None:
    """Write train-*.parquet and test-00000.parquet into ``folder``, unless they are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    wanted = {f"train-{i:05d}.parquet": GROUPS * ROWS for i in range(SHARDS)} | {"test-00000.parquet": TEST_ROWS}
    for number, (name, rows) in enumerate(wanted.items()):
        if (folder / name).exists():
            continue
        draws = torch.rand(rows, 2, generator=rng.generator(0, "photos", step=number), dtype=torch.float64).tolist()
        cells, labels = [], []
        for row, (down, right) in enumerate(draws):
            label = row % len(photos)
            height, width = photos[label].shape[:2]
            top, left = int(down * (height - SIDE + 1)), int(right * (width - SIDE + 1))
            encoded = io.BytesIO()
            Image.fromarray(photos[label][top : top + SIDE, left : left + SIDE]).save(encoded, "JPEG", quality=95)
            cells.append({"bytes": encoded.getvalue(), "path": f"{name}/{row}"})
            labels.append(label)
        written = io.BytesIO()
        pq.write_table(pa.table({"image": cells, "label": labels}), written, row_group_size=ROWS)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.partial" if isinstance(folder, Path) else folder / name  # an object is whole
        partial.write_bytes(written.getvalue())
        if isinstance(folder, Path):
            partial.rename(folder / name)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python infra/photo_shards.py FOLDER")
    write_photos(Path(sys.argv[1]))
