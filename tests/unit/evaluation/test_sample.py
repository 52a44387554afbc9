"""Which images are judged, and what is said where they are of few of the classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import evaluate
from dircluster.config import EvaluationConfig
from dircluster.evaluation.sample import class_notes

SORTED = torch.arange(10).repeat_interleave(40)
MIXED = torch.arange(10).repeat(40)


def of(*settings: EvaluationConfig, labels: Tensor = SORTED) -> list[str]:
    return [note for each in settings for note in class_notes(labels, each)]


@pytest.mark.parametrize(("images", "classes"), [(40, 1), (60, 2), (300, 8), (360, 9)])
def test_the_first_images_of_a_split_in_the_order_of_its_classes(images: int, classes: int) -> None:
    (note,) = of(EvaluationConfig(images=images))
    assert note == (
        f"the {images} judged images are of {classes} of 10 classes: --evaluation.sample SEED judges random ones"
    )


def test_the_first_images_of_the_verdict() -> None:
    assert of(EvaluationConfig(verdict=True)) == [
        "the 128 images of the verdict are of 4 of 10 classes: --evaluation.sample SEED --evaluation.images 128 takes"
        " random ones"
    ]
    assert not of(EvaluationConfig(), EvaluationConfig(verdict=True, images=128, sample=0))


def test_what_chance_leaves_out_is_not_noted() -> None:
    assert not of(*(EvaluationConfig(images=images, sample=seed) for images in (1, 5, 40) for seed in range(20)))
    assert not of(*(EvaluationConfig(images=images, verdict=True) for images in (1, 5, 9, 400)), labels=MIXED)
    rare = torch.cat([torch.zeros(400, dtype=torch.int64), torch.ones(1, dtype=torch.int64)])
    assert not of(EvaluationConfig(images=200), labels=rare)


@pytest.mark.parametrize("more", [{}, {"verdict": True}])
def test_a_report_says_it(more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    settings = EvaluationConfig(images=40, steps=1, verdict_images=16, queries=5)
    found = evaluate(module, torch.rand(400, 1, 2, 2), SORTED, settings=settings, **more)
    assert [note for note in found.notes if "classes" in note] == of(settings)
    assert "note: the 40 judged images are of 1 of 10 classes" in str(found)
