"""Attacks on randomized and non-differentiable models: EOT and BPDA (Athalye et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dircluster.attacks.gradient import Loss, Model, Objective, ValueAndGrad, cross_entropy_loss, value_and_grad


def expected(
    model: Model, labels: Tensor, draws: int, loss: Loss = cross_entropy_loss, most_rows: int | None = None
) -> ValueAndGrad:
    """The loss averaged over ``draws`` passes through a model that draws again for every row, and its gradient.

    The draws of an image pass side by side, at most ``most_rows`` rows at a time (all at once when not given): one
    call of many rows costs far less than many calls, and memory does not grow with ``draws``.
    """

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        values, gradient = torch.zeros(len(images), device=images.device), torch.zeros_like(images)
        for count in _portions(draws, len(images), most_rows):

            def objective(candidates: Tensor, count: int = count) -> Tensor:
                logits = model(candidates.repeat(count, 1, 1, 1))
                return loss(logits, labels.repeat(count)).view(count, len(candidates)).sum(dim=0)

            some, steep = value_and_grad(objective)(images)
            values, gradient = values + some / draws, gradient + steep / draws
        return values, gradient

    return both


def expected_values(
    model: Model, labels: Tensor, draws: int, loss: Loss = cross_entropy_loss, most_rows: int | None = None
) -> Objective:
    """The values of :func:`expected` alone."""

    def values(images: Tensor) -> Tensor:
        total = torch.zeros(len(images), device=images.device)
        for count in _portions(draws, len(images), most_rows):
            logits = model(images.repeat(count, 1, 1, 1))
            total = total + loss(logits, labels.repeat(count)).view(count, len(images)).sum(dim=0)
        return total / draws

    return values


def _portions(draws: int, images: int, most_rows: int | None) -> Iterator[int]:
    at_once = draws if most_rows is None else max(1, min(draws, most_rows // max(1, images)))
    for first in range(0, draws, at_once):
        yield min(at_once, draws - first)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, made: Tensor) -> Tensor:
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(images: Tensor, made: Tensor) -> Tensor:
    """``made`` from ``images``, both (N, C, H, W), with the identity for its backward pass (BPDA)."""
    passed: Tensor = _StraightThrough.apply(images, made.detach())
    return passed
