"""Streams: a batch is a function of (seed, epoch, step), whoever reads it, and nobody reads what is not theirs."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dircluster.config import ConfigError, DataConfig
from dircluster.data import layout, sources, stream
from dircluster.data.layout import split_sizes
from dircluster.data.sources import load
from dircluster.data.stream import Shards, StreamLoader, open_shards
from infra.photo_shards import write_photos
from tests.pictures import png

CONFIG = DataConfig(name="custom", uri="x", height=8, width=8, channels=1, classes=100, stream=True)


def write(folder: Path, name: str, values: range, rows: int) -> Path:
    """A shard whose images say by their gray which they are."""
    table = pa.table(
        {"image": [{"bytes": png(v, side=8), "path": ""} for v in values], "label": [v % 10 for v in values]}
    )
    pq.write_table(table, folder / name, row_group_size=rows)
    return folder / name


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """100 images in 13 row groups of three shards."""
    files = [write(tmp_path, f"train-{i}.parquet", range(i * 40, min(100, i * 40 + 40)), 8) for i in range(3)]
    return open_shards(files, CONFIG)


def grays(loader: StreamLoader, epoch: int, step: int) -> list[int]:
    images, labels, _ = loader(epoch, step)
    found = (images[:, 0, 0, 0] * 255).round().int().tolist()
    assert [v % 10 for v in found] == labels.tolist()
    return found


@pytest.mark.parametrize(("first", "rows"), [(0, 5), (0, 40), (1, 8)])
def test_a_shard_that_is_written_anew_while_it_is_read_is_one_line(
    shards: Shards, first: int, rows: int, tmp_path: Path
) -> None:
    group = shards.groups[1]
    assert len(stream.read_group(group)[1]) == 8
    write(tmp_path, "train-0.parquet", range(first, first + 40), rows)
    with pytest.raises(ConfigError, match=r"train-0.parquet was overwritten while it is read: .*; begin again$"):
        stream.read_group(group)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_workers_share_the_batches_of_one(shards: Shards, world: int) -> None:
    one = StreamLoader(shards, 24, 0, "t")
    several = [StreamLoader(shards, 24, 0, "t", rank=r, world=world) for r in range(world)]
    for epoch in range(2):
        for step in range(one.steps_per_epoch):
            parts = [grays(loader, epoch, step) for loader in several]
            assert [gray for part in parts for gray in part] == grays(one, epoch, step)


def test_a_batch_of_fewer_images_than_workers_is_refused(shards: Shards) -> None:
    with pytest.raises(ConfigError, match="at least the 9 workers, got 8"):
        StreamLoader(shards, 8, 0, "t", world=9)


def test_a_batch_depends_on_nothing_that_was_read_before(shards: Shards) -> None:
    straight = StreamLoader(shards, 24, 0, "t")
    seen = {(e, s): grays(straight, e, s) for e in range(3) for s in range(4)}
    for place in ((2, 3), (0, 1), (1, 0)):
        assert grays(StreamLoader(shards, 24, 0, "t"), *place) == seen[place]
    assert seen[0, 0] != seen[1, 0]
    assert grays(StreamLoader(shards, 24, 1, "t"), 0, 0) != seen[0, 0]


def test_a_loader_ends_with_its_stage(shards: Shards) -> None:
    """What it read, and its thread, must not wait for the next stage's to push it out."""
    loader = StreamLoader(shards, 24, 0, "t")
    grays(loader, 0, 0)
    assert loader._ahead is not None
    loader._ahead[1].result()  # it reads on meanwhile
    left = weakref.ref(loader)
    del loader
    gc.collect()
    assert left() is None


def test_an_epoch_sees_nearly_every_image_once(tmp_path: Path) -> None:
    files = [write(tmp_path, f"train-{i}.parquet", range(i * 48, i * 48 + 48), 8) for i in range(2)]
    loader = StreamLoader(open_shards(files, CONFIG), 24, 0, "t")
    assert loader.lanes == 12
    seen = [v for step in range(loader.steps_per_epoch) for v in grays(loader, 0, step)]
    assert sorted(seen) == list(range(96))  # row groups of equal size that fill the lanes
    uneven = StreamLoader(
        open_shards([*files, write(tmp_path, "train-2.parquet", range(96, 99), 3)], CONFIG), 24, 0, "t"
    )
    seen = [v for step in range(uneven.steps_per_epoch) for v in grays(uneven, 0, step)]
    assert len(set(seen)) > 0.7 * len(seen)


def test_a_worker_reads_the_row_groups_of_its_lanes_alone(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    original = stream.read_group
    monkeypatch.setattr(stream, "read_group", lambda group: (read.append(group), original(group))[1])
    by_rank = []
    for rank in range(3):
        read.clear()
        loader = StreamLoader(shards, 24, 0, "t", rank=rank, world=3)
        for step in range(loader.steps_per_epoch):
            grays(loader, 0, step)
        loader._pool.shutdown()
        begun = StreamLoader(shards, 24, 0, "t", rank=rank, world=3)
        own = {g for lane in range(rank * 4, rank * 4 + 4) for e in (0, 1) for g in begun._lane(e, lane)[1]}
        assert set(read) <= own
        by_rank.append({g for lane in range(rank * 4, rank * 4 + 4) for g in begun._lane(0, lane)[1]})
    assert set.union(*by_rank) == set(shards.groups)
    assert sum(map(len, by_rank)) == len(shards.groups)


def test_held_out_row_groups_are_never_trained_on(tmp_path: Path) -> None:
    write(tmp_path, "train-0.parquet", range(96), 8)
    write(tmp_path, "test-0.parquet", range(96, 100), 8)
    config = DataConfig(name="custom", uri=str(tmp_path), height=8, width=8, channels=1, classes=100, stream=True)
    data = load(config, 0)
    assert isinstance(data.train, Shards)
    held = set(data.held_out.images[:, 0, 0, 0].tolist())
    loader = StreamLoader(data.train, 8, 0, "t")
    trained = {v for step in range(loader.steps_per_epoch) for v in grays(loader, 0, step)}
    assert (len(held), len(data.train), len(data.test)) == (16, 80, 4)  # a tenth, in whole row groups
    assert not held & trained
    assert load(config, 0).fingerprint == data.fingerprint
    assert load(config, 1).held_out.labels.tolist() != data.held_out.labels.tolist()


def test_of_a_large_stream_few_are_held_out_and_the_sizes_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (layout, sources):
        monkeypatch.setattr(module, "MOST_HELD_OUT", 8)
    write(tmp_path, "train-0.parquet", range(96), 8)
    write(tmp_path, "test-0.parquet", range(96, 100), 8)
    config = dataclasses.replace(CONFIG, uri=str(tmp_path), held_out=0.5)
    data = load(config, 0)
    assert split_sizes(config) == (len(data.train), len(data.held_out), len(data.test)) == (88, 8, 4)


def test_streams_that_cannot_be_are_refused(tmp_path: Path) -> None:
    config = DataConfig(name="custom", uri=str(tmp_path), height=8, width=8, channels=1, stream=True)
    write(tmp_path, "train-0.parquet", range(20), 20)
    with pytest.raises(ConfigError, match="needs parquet shards train\\* and test\\*"):
        load(config, 0)
    write(tmp_path, "test-0.parquet", range(4), 4)
    with pytest.raises(ConfigError, match="leaves no row group of 1; write smaller row groups"):
        load(config, 0)
    (tmp_path / "train-1.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"train-1.parquet cannot be read as parquet"):
        load(config, 0)


def test_photos_are_real_shards_written_once(tmp_path: Path) -> None:
    write_photos(tmp_path)
    before = {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    write_photos(tmp_path)
    assert {f.name: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before
    config = DataConfig(
        name="custom", uri=str(tmp_path), height=224, width=224, channels=3, classes=2, resize=True, stream=True
    )
    data = load(config, 0)
    assert data.held_out.images.shape[1:] == (3, 224, 224)
    assert data.held_out.images.float().std() > 20
    images, labels, _ = StreamLoader(data.train, 16, 0, "t")(0, 0)
    assert images.shape == (16, 3, 224, 224)
    assert set(labels.tolist()) == {0, 1}
    assert torch.is_floating_point(images)
