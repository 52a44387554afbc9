"""Training splits larger than memory: parquet shards, read while they are trained on, in an order that can be computed.

The row groups of all shards are dealt out to lanes, again in each epoch; a global batch takes equally many images from
every lane. So a batch is a function of (seed, epoch, step) alone, whatever the number of workers; a worker reads the
lanes of its own rows and no others; and a resumed run reads on where it stopped. What a stream gives up: an image is
shuffled among the rows of its row group, and row groups among the lanes, but not among all images; and a lane that ends
early begins again, so that in one epoch some images come twice and as many not at all (few where there are many row
groups a lane). A worker keeps two row groups a lane in memory, as they are encoded.
"""

from __future__ import annotations

import hashlib
import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import ConfigError, DataConfig
from dircluster.data import parquet
from dircluster.data.augment import augmented
from dircluster.data.decode import decode
from dircluster.data.global_batch import worker_rows
from dircluster.data.picture import Cell

MOST_LANES = 64
"""Workers up to which nothing is read twice."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of one shard."""

    shard: Path
    number: int
    rows: int
    first: int
    """Row of the shard that is its first."""
    columns: parquet.Columns
    labels: str
    """SHA-256 of its labels."""


@dataclass(frozen=True)
class Shards:
    """The row groups of a training split that stays where it is."""

    groups: tuple[RowGroup, ...]
    config: DataConfig
    columns: parquet.Columns
    """Those of the first shard that names its classes."""

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def split_off(self, share: float, most: int, seed: int) -> tuple[Shards, Shards]:
        """Whole row groups, chosen by ``seed``, of at least ``share`` of all rows or ``most``: -> rest, split off."""
        order = torch.randperm(len(self.groups), generator=rng.generator(seed, "held_out")).tolist()
        wanted, cut = max(1, min(round(share * len(self)), most)), 0
        while wanted > 0 and cut < len(order):
            wanted -= self.groups[order[cut]].rows
            cut += 1
        if cut == len(order):
            raise ConfigError(f"data.held_out {share:g} leaves no row group of {len(order)}; write smaller row groups")
        parts = (sorted(order[cut:]), sorted(order[:cut]))
        rest, off = (replace(self, groups=tuple(self.groups[i] for i in part)) for part in parts)
        return rest, off

    def fingerprint(self) -> str:
        """SHA-256 of names, sizes, row counts and labels, and of columns that were asked for: no image is read."""
        asked = (self.config.image_column, self.config.label_column)
        digest = hashlib.sha256(repr(asked).encode() if any(asked) else b"")
        sizes = {shard: shard.stat().st_size for shard in {group.shard for group in self.groups}}
        for group in self.groups:
            facts = (group.shard.name, group.number, group.rows, sizes[group.shard], group.labels)
            digest.update(f"{'/'.join(map(str, facts))}\n".encode())
        return digest.hexdigest()


def open_shards(files: list[Path], config: DataConfig, root: Path | None = None) -> Shards:
    """The row groups of parquet ``files``: their footers and labels are read and checked, their images are not.

    Folders below ``root`` may hold labels. Raises ConfigError where a file is no parquet file, has no images or
    labels, or has others than the rest.
    """
    chosen = parquet.choose_all(files, config, root)
    groups: list[RowGroup] = []
    for file, columns in chosen.items():
        with parquet.opened(file) as table:
            read = table.read(columns=columns.stored[1:])
            labels = parquet.labels(read, columns, file)
            parquet.check_labels(labels, config, file)
            sizes = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
        first = itertools.accumulate(sizes, initial=0)
        numbered = enumerate(zip(sizes, first, strict=False))
        groups += [
            RowGroup(file, i, rows, start, columns, _digest(labels[start : start + rows]))
            for i, (rows, start) in numbered
            if rows
        ]
    return Shards(tuple(groups), config, parquet.same_columns(chosen, config))


def _digest(labels: list[int]) -> str:
    return hashlib.sha256(np.array(labels, np.int64).tobytes()).hexdigest()


def read_group(group: RowGroup) -> tuple[list[Cell], list[int]]:
    """Encoded images and labels of a row group. Raises ConfigError where it is damaged, or has other rows or labels."""
    try:
        with parquet.opened(group.shard) as table:
            there, other = table.metadata, f"{group.shard} was overwritten while it is read: its"
            if group.number >= there.num_row_groups or there.row_group(group.number).num_rows != group.rows:
                raise ConfigError(f"{other} row groups are others; begin again")
            read = table.read_row_group(group.number, columns=group.columns.stored)
            found = parquet.contents(read, group.columns, group.shard, group.first)
            if _digest(found[1]) != group.labels:
                raise ConfigError(f"{other} labels are others; begin again")
            return found
    except ConfigError as error:
        if isinstance(error.__cause__, TimeoutError | ConnectionError):  # storage is away: a restart may help
            raise error.__cause__ from None
        raise


class StreamLoader:
    """One worker's share of every global batch of ``shards``, read and decoded a batch ahead."""

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        seed: int,
        purpose: str,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.rows = worker_rows(batch_size, len(shards), rank, world)
        self.shards, self.batch_size, self.seed, self.purpose = shards, batch_size, seed, purpose
        self.device = device or torch.device("cpu")
        self.steps_per_epoch = len(shards) // batch_size
        most = min(MOST_LANES, len(shards.groups))
        self.lanes = max(n for n in range(1, most + 1) if batch_size % n == 0)
        self._lane_rows = batch_size // self.lanes
        held = -(-(self.rows.stop - self.rows.start) // self._lane_rows) + 1
        self._group = lru_cache(maxsize=2 * held)(read_group)
        self._lane = lru_cache(maxsize=2 * MOST_LANES)(self._lane_of)  # of this loader: its stage ends, and so do they
        self._shuffled = lru_cache(maxsize=2 * MOST_LANES)(self._order_of)
        self._ahead: tuple[tuple[int, int], Future[Any]] | None = None
        self._pool = ThreadPoolExecutor(1, "stream")

    def __call__(self, epoch: int, step: int) -> tuple[Tensor, Tensor, rng.Stream]:
        """Images (n, C, H, W) in [0, 1], labels (n,), and the draws of the step. ``step`` counts within the epoch."""
        ahead, self._ahead = self._ahead, None
        images, labels = ahead[1].result() if ahead and ahead[0] == (epoch, step) else self._read(epoch, step)
        following = divmod(epoch * self.steps_per_epoch + step + 1, self.steps_per_epoch)
        self._ahead = (following, self._pool.submit(self._read, *following))
        stream = rng.Stream(self.seed, epoch, step, self.batch_size, self.rows, self.device, prefix=self.purpose)
        config = self.shards.config
        images = augmented(rng.placed(images, self.device), stream, config.crop_padding, config.flip)
        return images.float() / 255, rng.placed(labels, self.device), stream

    def _read(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        blobs, labels = [], []
        for row in range(self.rows.start, self.rows.stop):
            lane, offset = divmod(row, self._lane_rows)
            blob, label = self._image(epoch, lane, step * self._lane_rows + offset)
            blobs.append(blob)
            labels.append(label)
        return decode(blobs, self.shards.config), torch.tensor(labels, dtype=torch.int64)

    def _image(self, epoch: int, lane: int, position: int) -> tuple[Cell, int]:
        """The image at ``position`` of a lane in an epoch."""
        ends, groups = self._lane(epoch, lane)
        position %= ends[-1]
        index = next(i for i, end in enumerate(ends) if position < end)
        group = groups[index]
        inside = position - (ends[index] - group.rows)
        row = self._shuffled(epoch, lane, index, group.rows)[inside]
        blobs, labels = self._group(group)
        return blobs[row], labels[row]

    def _lane_of(self, epoch: int, lane: int) -> tuple[list[int], list[RowGroup]]:
        generator = rng.generator(self.seed, f"{self.purpose}/order", epoch)
        order = torch.randperm(len(self.shards.groups), generator=generator).tolist()
        groups = [self.shards.groups[i] for i in order[lane :: self.lanes]]
        return list(itertools.accumulate(group.rows for group in groups)), groups

    def _order_of(self, epoch: int, lane: int, index: int, rows: int) -> list[int]:
        generator = rng.generator(self.seed, f"{self.purpose}/rows/{lane}/{index}", epoch)
        order: list[int] = torch.randperm(rows, generator=generator).tolist()
        return order
