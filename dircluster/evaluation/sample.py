"""Which test images are judged: the first ones, or a random sample that a seed names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def n_of(row: Mapping[str, Any]) -> str:
    """How many images a row of results is of, with the sample where they are not the first ones."""
    return str(row["total"]) if row.get("sample") is None else f"{row['total']} (sample {row['sample']})"


def images_of(row: Mapping[str, Any]) -> str:
    """The same as words for the title of a table."""
    chosen = "first" if row.get("sample") is None else f"sample {row['sample']} of"
    return f"{chosen} {row['total']} images"
