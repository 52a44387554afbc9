"""First-order attacks on any callable: FGSM, PGD and the ascent they share.

None of them asks for a parameter's gradient, draws from global random state, or knows what it attacks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster.attacks.threat import LInf

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> logits (N, classes)."""
Objective = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> what the attacker wants large, (N,)."""


def ascend(objective: Objective, start: Tensor, center: Tensor, threat: LInf, steps: int, step_size: float) -> Tensor:
    """Projected sign-gradient ascent from ``start`` within ``threat`` around ``center``: -> (N, C, H, W), detached."""
    reached = start.detach()
    for _ in range(steps):
        with torch.enable_grad():
            reached.requires_grad_(True)
            (gradient,) = torch.autograd.grad(objective(reached).sum(), reached)
        reached = threat.project(reached.detach() + step_size * gradient.sign(), center)
    return reached.detach()


def cross_entropy(model: Model, labels: Tensor) -> Objective:
    """Cross-entropy of each image at its true label."""

    def objective(images: Tensor) -> Tensor:
        return F.cross_entropy(model(images).float(), labels, reduction="none")

    return objective


def fgsm(model: Model, images: Tensor, labels: Tensor, threat: LInf) -> Tensor:
    """One step of the full radius (Goodfellow et al. 2015): (N, C, H, W), (N,) -> (N, C, H, W)."""
    return ascend(cross_entropy(model, labels), images, images, threat, 1, threat.epsilon)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: LInf,
    steps: int,
    step_size: float,
    uniform: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018): (N, C, H, W), (N,) -> (N, C, H, W).

    ``uniform`` in [0, 1), shaped like ``images``, gives a random start; without it the ascent starts at the images.
    """
    start = images if uniform is None else threat.start(images, uniform)
    return ascend(cross_entropy(model, labels), start, images, threat, steps, step_size)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of each pair of logits, in nats: (N, classes), (N, classes) -> (N,)."""
    log_p, log_q = F.log_softmax(reference.float(), dim=1), F.log_softmax(other.float(), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def kl_ascent(
    model: Model, images: Tensor, reference: Tensor, threat: LInf, steps: int, step_size: float, normal: Tensor
) -> Tensor:
    """Images near ``images`` whose prediction is farthest from ``reference`` in KL(reference || .).

    (N, C, H, W), logits (N, classes) -> (N, C, H, W). It starts at ``images + 1e-3 * normal``: the gradient of the
    divergence vanishes at the images themselves. TRADES (Zhang et al. 2019) and Eq. 4 craft so.
    """

    def objective(candidates: Tensor) -> Tensor:
        return kl_divergence(reference, model(candidates))

    return ascend(objective, images + 1e-3 * normal, images, threat, steps, step_size)
