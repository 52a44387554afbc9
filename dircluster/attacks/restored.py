"""Attacks on the restored image, past the denoiser: the perturbation of Eq. 4 and the attack of Eq. 9."""

from __future__ import annotations

from torch import Tensor

from dircluster.attacks.gradient import Model, kl_ascent, pgd
from dircluster.attacks.threat import LInf


def perturbation(
    classifier: Model,
    restored: Tensor,
    reference: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    normal: Tensor,
) -> Tensor:
    """delta of Eq. 4, which maximises KL(h(x~) || h(x~ + delta)) in the ball: -> (N, C, H, W), detached.

    ``restored`` (N, C, H, W) is x~ and ``reference`` (N, classes) its logits, both detached. The ball is not cut with
    the pixel range, since x~ is not clamped either.
    """
    threat = LInf(epsilon, pixels=False)
    return kl_ascent(classifier, restored, reference, threat, steps, step_size, normal) - restored


def restored_attack(
    classifier: Model,
    restored: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    uniform: Tensor | None = None,
) -> Tensor:
    """PGD on the classifier alone, started at restored images (Eq. 9): (N, C, H, W), (N,) -> (N, C, H, W).

    The ball is not cut with the pixel range, since restored images are not clamped either.
    """
    return pgd(classifier, restored, labels, LInf(epsilon, pixels=False), steps, step_size, uniform)
