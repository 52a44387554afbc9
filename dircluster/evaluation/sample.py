"""Which test images are judged: the first ones, or a random sample that a seed names."""

from __future__ import annotations

import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import EvaluationConfig


def judged_rows(total: int, settings: EvaluationConfig) -> Tensor | slice:
    """The rows of a test split of ``total`` images that are judged: a slice, or (n,) int64 in ascending order."""
    if settings.sample is None:
        return slice(settings.images)
    order = torch.randperm(total, generator=rng.generator(settings.sample, "evaluation/sample"))
    return order[: settings.images].sort().values


def row_numbers(total: int, settings: EvaluationConfig) -> list[int]:
    """The same as numbers, in the order in which they are judged."""
    numbers: list[int] = torch.arange(total)[judged_rows(total, settings)].tolist()
    return numbers
