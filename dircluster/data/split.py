"""Splits of a labeled image set in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from dircluster.data.stream import Shards


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W) uint8 and their labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor | slice) -> Split:
        """Some of the rows, in the order given."""
        return Split(self.images[rows], self.labels[rows])

    def pixels(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Images as floats in [0, 1]: -> (n, C, H, W)."""
        return self.images[rows].float() / 255


@dataclass(frozen=True)
class Dataset:
    """The three splits: training fits, held_out selects, and test is for the final evaluation alone."""

    train: Split | Shards
    held_out: Split
    test: Split
    fingerprint: str
    """SHA-256 of the images and labels of all splits; of a split that is streamed, of names, sizes, row counts and
    labels."""
    classes: tuple[str, ...] = ()
    """Names of the classes by label, where folders or the metadata of parquet files say them."""
    notes: tuple[str, ...] = ()
    """What was decided in reading, a line each: which of several columns was taken, what is not there."""
