"""Shards of one set have one name, and sets that are told apart by a number have two."""

from __future__ import annotations

import random
import uuid

import pytest

from dircluster.data.set_names import set_names

_DRAW = random.Random(0)


def _uuid() -> str:
    return str(uuid.UUID(int=_DRAW.getrandbits(128)))


ONE = {
    "spark": [f"part-{i:05d}-{_uuid()}-c000.snappy" for i in (0, 1, 17)],
    "databricks": [f"part-{i:05d}-tid-{8837 + i}-{_uuid()}-{i * 7}-1-c000.snappy" for i in (0, 1, 7)],
    "hadoop": ["part-r-00000.gz", "part-r-00003.gz"],
    "hub": [f"train-{i:05d}-of-00294-{_DRAW.getrandbits(64):016x}" for i in range(294)],
    "converted by the hub": ["0000", "0001", "0012"],
    "dask": ["part.0", "part.1", "part.9"],
    "bigquery": ["000000000000", "000000000007"],
    "snowflake": ["data_0_0_0.snappy", "data_0_3_0.snappy", "data_1_1_0.snappy"],
    "glue": [f"run-1601234567890-part-block-0-r-{i:05d}-snappy" for i in (1, 7)],
    "hashes": [_uuid().replace("-", "") for _ in range(50)],
    "arrow": [f"{_uuid().replace('-', '')}-0" for _ in range(50)],
    "ray": [f"{_uuid().replace('-', '')}_{i:06d}_{j:06d}" for i in (0, 5) for j in (0, 3)],
    "folders": ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000"],
    "signs": ["train-0", "train_1", "Train 2"],
    "from 1": ["data_batch_1", "data_batch_2", "data_batch_3"],
    "wider than the zeros": ["train-08", "train-99", "train-100"],
    "a part without others": ["shard-3", "shard-5"],
    "of": ["train-1-of-9", "train-4-of-9"],
    "a version": ["set-v1.0-00000-of-00002", "set-v1.0-00001-of-00002"],
}


@pytest.mark.parametrize("name", ONE)
def test_shards_are_one_set(name: str) -> None:
    assert len({*set_names(ONE[name])}) == 1


TWO = {
    "versions": ["x-v1", "x-v2", "x-v1.0", "x-v1.1", "x version 1"],
    "sizes": ["x-224", "x-32", "x-32x32", "x-64x64"],
    "sizes with zeros": ["x-064", "x-128", "y-08", "y-32", "cifar-010", "cifar-100"],
    "long words": ["imagenet1kvalidated-0", "imagenet21kwinterx-1"],
    "shares": ["x-1k", "x-2k", "x-0.1", "x-0.2"],
    "years": ["x-2017", "x-2018"],
    "names with numbers": ["cifar10", "cifar100", "cifar10-0", "cifar100-0"],
    "numbers of other things": ["x_fold0", "x_fold1", "task1_x", "task2_x"],
    "another count": ["x-0-of-1", "x-0-of-2"],
    "copies": ["0", "0 (copy)", "0 (1)"],
    "folders": ["0", "old/0", "cifar/0", "svhn/0"],
}


@pytest.mark.parametrize("name", TWO)
def test_other_numbers_and_words_are_other_sets(name: str) -> None:
    assert len({*set_names(TWO[name])}) == len(TWO[name])
