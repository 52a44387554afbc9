"""Which rows of every global batch are a worker's."""

from __future__ import annotations

from dircluster.config import ConfigError


def worker_rows(batch_size: int, images: int, rank: int, world: int) -> slice:
    """The rows of worker ``rank`` of ``world``; shares differ by an image at the most.

    Raises ConfigError where there are fewer training images than a batch has, or fewer of these than workers.
    """
    if images < batch_size:
        raise ConfigError(f"training.batch_size {batch_size} is more than the {images} training images")
    if batch_size < world:
        raise ConfigError(f"training.batch_size must be at least the {world} workers, got {batch_size}")
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)
