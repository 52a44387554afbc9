"""Attacks on the restored image, past the denoiser: the perturbation of Eq. 4."""

from __future__ import annotations

from torch import Tensor

from dircluster.attacks.gradient import Model, kl_ascent
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
