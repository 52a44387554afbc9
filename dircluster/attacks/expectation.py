"""Attacks on randomized and non-differentiable models: EOT and BPDA (Athalye et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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


def expected_with_logits(
    model: Model, labels: Tensor, draws: int, loss: Loss = cross_entropy_loss, most_rows: int | None = None
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """What :func:`expected` gives, and the logits that it saw: (draws, N, classes), detached."""
    seen: list[Tensor] = []

    def seeing(logits: Tensor, repeated: Tensor) -> Tensor:
        seen.append(logits.detach())
        return loss(logits, repeated)

    both = expected(model, labels, draws, seeing, most_rows)

    def all_three(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.clear()
        values, gradient = both(images)
        return values, gradient, torch.cat(seen).view(draws, len(images), -1)

    return all_three


def averaged_logits(logits: Tensor) -> Tensor:
    """Logits of the probabilities averaged over draws: (draws, N, classes) -> (N, classes)."""
    if len(logits) == 1:
        return logits[0]
    return logits.float().log_softmax(dim=2).logsumexp(dim=0) - math.log(len(logits))


def voting(model: Model, votes: int, apart: bool = False) -> Model:
    """The averaged probabilities of ``votes`` passes, as logits: what an attack on their majority follows.

    Side by side the model draws again for every row; ``apart``, one after another, for every pass.
    """

    def voted(images: Tensor) -> Tensor:
        if apart:
            return averaged_logits(torch.stack([model(images) for _ in range(votes)]))
        return averaged_logits(model(images.repeat(votes, 1, 1, 1)).view(votes, len(images), -1))

    return voted


def in_parts(both_of: Callable[[Tensor], ValueAndGrad], labels: Tensor, rows: int) -> ValueAndGrad:
    """What ``both_of`` makes of labels, for so many images at a time: memory does not grow with their number."""

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [slice(first, first + rows) for first in range(0, len(images), rows)]
        made = [both_of(labels[part])(images[part]) for part in parts]
        return torch.cat([values for values, _ in made]), torch.cat([gradient for _, gradient in made])

    return both


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
