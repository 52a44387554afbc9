"""Which test images are judged: the first ones, or a random sample that a seed names."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import EvaluationConfig

RARE = 1e-3
"""Chance of a random sample to miss as many classes, below which images are taken to lie in the order of classes."""


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


def class_notes(labels: Tensor, settings: EvaluationConfig) -> list[str]:
    """A line where the judged images, or those of the verdict, lack classes that a random sample would have.

    ``labels`` (n,) are those of the whole test split: one in the order of its classes begins with some of them alone.
    """
    known, judged = labels.tolist(), labels[judged_rows(len(labels), settings)].tolist()
    asked = judged[: settings.verdict_images] if settings.verdict else judged
    for which, some, way_out in (
        ("judged images", judged, "--evaluation.sample SEED judges random ones"),
        (
            "images of the verdict",
            asked,
            f"--evaluation.sample SEED --evaluation.images {len(asked)} takes random ones",
        ),
    ):
        if _lacks(some, known):
            return [f"the {len(some)} {which} are of {len(set(some))} of {len(set(known))} classes: {way_out}"]
    return []


def _lacks(some: list[int], labels: list[int]) -> bool:
    """Whether ``some`` lack more classes of ``labels`` than chance has it, by Chernoff's bound for their number."""
    counts = Counter(labels)
    missing = len(counts) - len(set(some))
    expected: float = sum((1 - count / len(labels)) ** len(some) for count in counts.values())
    return missing > 0 and (math.e * expected / missing) ** missing < RARE
