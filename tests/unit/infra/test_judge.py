"""infra/gpu/judge.py takes no shard for one of another defense or of other images."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.gpu import judge
from tests.pictures import png


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two folders in the form of CIFAR-10: a and b."""
    for name, gray in (("a", 0), ("b", 100)):
        (tmp_path / name).mkdir()
        table = pa.table({"image": [png(gray + i, side=32) for i in range(10)], "label": [*range(10)]})
        for split in ("train", "test"):
            pq.write_table(table, tmp_path / name / f"{split}.parquet")
    return tmp_path


def test_each_defense_and_set_of_images_has_shards_of_its_own(data: Path, tmp_path: Path) -> None:
    dir_, hgd = "zoo:cifar10-small-dir", "zoo:cifar10-small-hgd"
    first = ["--defense", dir_, "--data", str(data / "a"), "--images", "4"]
    others = (
        ["--defense", hgd, "--data", str(data / "a"), "--images", "4"],
        ["--defense", dir_, "--data", str(data / "b"), "--images", "4"],
        ["--defense", dir_, "--data", str(data / "a"), "--images", "6"],
    )
    usual = ["--shard", "2", "--seconds", "600", "--only", "natural-none", "--out", str(tmp_path / "out")]
    shards: list[int] = []
    for words in (first, *others, first):
        assert judge.main([*words, *usual]) == 0
        shards.append(len(list((tmp_path / "out").glob("shards-*/*/shard-*.json"))))
    assert shards == [2, 4, 6, 9, 9]
    facts = json.loads((tmp_path / "out" / "judged-natural-none.json").read_text())
    assert (facts["defense"], facts["images"]) == (dir_, 4)
