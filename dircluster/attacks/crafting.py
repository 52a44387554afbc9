"""Training samples against a whole pipeline, h(g(x)): the paper's PGD, and cheaper ways to nearly as strong ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dircluster.attacks.expectation import straight_through
from dircluster.attacks.gradient import Model, cross_entropy, n_fgsm, pgd, projected_ascent, value_and_grad
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig


def craft(
    purifier: Callable[[Tensor], Tensor],
    target: Model,
    images: Tensor,
    labels: Tensor,
    attack: AttackConfig,
    uniform: Tensor,
    number: int = 0,
) -> Tensor:
    """Samples by ``attack.crafting`` against ``target(purifier(.))``: (N, C, H, W), (N,) -> (N, C, H, W), detached.

    ``uniform`` in [0, 1), shaped like ``images``, gives the start; ``number`` is the batch's, for
    ``attack.pipeline_every``. Steps on the target alone cost no pass through the purifier, and a sample that fools the
    target is a good start against the pipeline; a straight-through step runs the purifier forward only (BPDA with the
    identity, Athalye et al. 2018).
    """
    threat = threat_of(attack)

    def pipeline(candidates: Tensor) -> Tensor:
        return target(purifier(candidates))

    def past_purifier(candidates: Tensor) -> Tensor:
        with torch.no_grad():
            purified = purifier(candidates)
        return target(straight_through(candidates, purified))

    if attack.crafting == "n_fgsm":
        return n_fgsm(pipeline, images, labels, threat, uniform)
    if attack.crafting == "pgd":
        return pgd(pipeline, images, labels, threat, attack.steps, attack.step, uniform)
    reached = pgd(target, images, labels, threat, attack.steps, attack.step, uniform)
    own = attack.crafting == "target_first" and number % attack.pipeline_every == 0
    last = value_and_grad(cross_entropy(pipeline if own else past_purifier, labels))
    return projected_ascent(last, reached, images, threat, attack.pipeline_steps, attack.step)
