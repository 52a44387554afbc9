"""Batches as a function of (seed, epoch, step): no loader processes, and nothing to restore after a crash."""

from __future__ import annotations

import torch
from torch import Tensor

from dircluster import rng
from dircluster.data.augment import augmented
from dircluster.data.global_batch import worker_rows
from dircluster.data.split import Split


class Loader:
    """One worker's share of every global batch of a split that lies in memory on ``device``."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        purpose: str,
        *,
        crop_padding: int = 0,
        flip: bool = False,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.rows = worker_rows(batch_size, len(split), rank, world)
        self.device = device or torch.device("cpu")
        self.split = Split(split.images.to(self.device), split.labels.to(self.device))
        self.batch_size, self.seed, self.purpose = batch_size, seed, purpose
        self.crop_padding, self.flip = crop_padding, flip
        self.steps_per_epoch = len(split) // batch_size
        self._order: tuple[int, Tensor] | None = None

    def __call__(self, epoch: int, step: int) -> tuple[Tensor, Tensor, rng.Stream]:
        """Images (n, C, H, W) in [0, 1], labels (n,), and the draws of the step. ``step`` counts within the epoch."""
        if self._order is None or self._order[0] != epoch:
            generator = rng.generator(self.seed, f"{self.purpose}/order", epoch)
            self._order = (epoch, torch.randperm(len(self.split), generator=generator))
        batch = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        chosen = rng.placed(batch[self.rows], self.device)
        images, labels = self.split.images[chosen], self.split.labels[chosen]
        stream = rng.Stream(self.seed, epoch, step, self.batch_size, self.rows, self.device, prefix=self.purpose)
        images = augmented(images, stream, self.crop_padding, self.flip)
        return images.float() / 255, labels, stream
