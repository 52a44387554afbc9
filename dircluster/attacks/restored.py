"""Attacks on the restored image, past the denoiser: the perturbation of Eq. 4 and the attack of Eq. 9."""

from __future__ import annotations

from torch import Tensor

from dircluster.attacks.gradient import Model, kl_ascent, pgd
from dircluster.attacks.threat import Threat


def perturbation(
    classifier: Model,
    restored: Tensor,
    reference: Tensor,
    threat: Threat,
    steps: int,
    step_size: float,
    normal: Tensor,
) -> Tensor:
    """delta of Eq. 4, which maximizes KL(h(x~) || h(x~ + delta)) in the ball: -> (N, C, H, W), detached.

    ``restored`` (N, C, H, W) is x~ and ``reference`` (N, classes) its logits, both detached. The ball of ``threat`` is
    not cut with the pixel range, since x~ is not clamped either.
    """
    return kl_ascent(classifier, restored, reference, threat.unclipped(), steps, step_size, normal) - restored


def restored_attack(
    classifier: Model,
    restored: Tensor,
    labels: Tensor,
    threat: Threat,
    steps: int,
    step_size: float,
    uniform: Tensor | None = None,
) -> Tensor:
    """PGD on the classifier alone, started at restored images (Eq. 9): (N, C, H, W), (N,) -> (N, C, H, W).

    The ball of ``threat`` is not cut with the pixel range, since restored images are not clamped either.
    """
    return pgd(classifier, restored, labels, threat.unclipped(), steps, step_size, uniform)
