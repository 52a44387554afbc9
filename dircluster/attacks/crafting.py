"""Training samples against a whole pipeline, h(g(x)): the paper's PGD, and cheaper ways to nearly as strong ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dircluster.attacks.expectation import straight_through
from dircluster.attacks.gradient import Objective, projected_ascent, value_and_grad
from dircluster.attacks.threat import Threat, threat_of
from dircluster.config import AttackConfig


def craft(
    purifier: Callable[[Tensor], Tensor],
    objective: Objective,
    images: Tensor,
    attack: AttackConfig,
    uniform: Tensor,
    number: int = 0,
) -> Tensor:
    """Samples by ``attack.crafting`` against ``purifier``: (N, C, H, W) -> (N, C, H, W), detached.

    ``objective`` is what the attacker wants large of images that the target is given, such as the cross-entropy of its
    logits. ``uniform`` in [0, 1), shaped like ``images``, gives the start; ``number`` is that of the step within
    its stage, for ``attack.pipeline_every``. Steps on the target alone cost no pass through the purifier, and a sample
    that fools the target is a good start against the pipeline; a straight-through step runs the purifier forward only
    (BPDA with the identity, Athalye et al. 2018).
    """
    threat = threat_of(attack)

    def pipeline(candidates: Tensor) -> Tensor:
        return objective(purifier(candidates))

    def past_purifier(candidates: Tensor) -> Tensor:
        with torch.no_grad():
            purified = purifier(candidates)
        return objective(straight_through(candidates, purified))

    def ascended(what: Objective, start: Tensor, steps: int) -> Tensor:
        return projected_ascent(value_and_grad(what), start, images, threat, steps, attack.step)

    if attack.crafting == "n_fgsm":
        return n_fgsm(pipeline, images, threat, uniform)
    start = threat.start(images, uniform)
    if attack.crafting == "pgd":
        return ascended(pipeline, start, attack.steps)
    own = attack.crafting == "target_first" and number % attack.pipeline_every == 0
    reached = ascended(objective, start, attack.steps)
    return ascended(pipeline if own else past_purifier, reached, attack.pipeline_steps)


def n_fgsm(objective: Objective, images: Tensor, threat: Threat, uniform: Tensor) -> Tensor:
    """One step of the radius from noise of twice the radius (N-FGSM, de Jorge et al. 2022): -> (N, C, H, W).

    ``uniform`` in [0, 1), shaped like ``images`` (N, C, H, W), gives the noise. What comes out lies in [0, 1], and up
    to three radii away: drawing it back into the ball is what lets one-step training overfit.
    """
    start = threat.unclipped(2.0).start(images, uniform).clamp(0.0, 1.0)
    gradient = value_and_grad(objective)(start)[1]
    return (start + threat.epsilon * threat.direction(gradient)).clamp(0.0, 1.0)
