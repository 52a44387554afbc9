"""The masking-related adaptive attack of Eq. 8: the attacker knows the masks, or redraws them as the defense does."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dircluster.attacks.gradient import Loss, cross_entropy_loss, value_and_grad
from dircluster.attacks.threat import Threat

Masked = Callable[[Tensor, Tensor], Tensor]
"""Images (N, C, H, W), masks (K, N, n) -> logits (N, classes)."""


def masked_attack(
    model: Masked,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    steps: int,
    step_size: float,
    masks: Callable[[], Tensor],
    pixels: Callable[[Tensor], Tensor],
    uniform: Tensor | None = None,
    loss: Loss = cross_entropy_loss,
) -> Tensor:
    """Each step ascends through one mask of the defense's set alone, and only its kept pixels move: -> (N, C, H, W).

    Eq. 8 with x* = x * m. ``masks`` gives the set of a step, (K, N, n): always the same one (the fixed form, where
    attacker and defense share it) or a new one (the fresh form); step t takes its mask t modulo K. ``pixels`` turns
    masks (1, N, n) into images of ones and zeros (1, N, 1, H, W).
    """
    reached = (images if uniform is None else threat.start(images, uniform)).detach()
    for step in range(steps):
        kept = masks()
        mask = kept[step % len(kept)][None]

        def objective(candidates: Tensor, mask: Tensor = mask) -> Tensor:
            return loss(model(candidates, mask), labels)

        _, gradient = value_and_grad(objective)(reached)
        gradient = gradient * pixels(mask)[0].to(gradient.device)
        reached = threat.project(reached + step_size * threat.direction(gradient), images)
    return reached
