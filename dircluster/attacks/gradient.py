"""First-order attacks on any callable: FGSM, PGD, MI-FGSM, VNI-FGSM, and the ascent they share.

None of them asks for a parameter's gradient, draws from global random state, or knows what it attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster.attacks.threat import Threat
from dircluster.config import ConfigError

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> logits (N, classes)."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, classes), labels (N,) -> what the attacker wants large, (N,)."""
Objective = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) -> what the attacker wants large, (N,)."""
ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (N, C, H, W) -> an objective's values (N,) and its gradient (N, C, H, W), both detached."""


TIE = 1e-30
"""By how much a tie that the true class wins is short of being wrong: less than any two logits differ by."""


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y in nats: (N, classes), (N,) -> (N,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """max over k != y of z_k, minus z_y: positive where the image is misclassified. (N, classes), (N,) -> (N,)."""
    true = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(dim=1) - logits.gather(1, labels[:, None])[:, 0]


def surely(margin: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Margins (N,) whose sign is the answer's: 0 or more where it is wrong. (N,), (N, classes), (N,) -> (N,).

    Of classes that share the highest logit one is the answer, which may be the true one: then it is just below 0. What
    is no number is wrong.
    """
    tied = (margin >= 0) & (logits.argmax(dim=1) == labels)
    return torch.where(logits.isfinite().all(dim=1), margin.masked_fill(tied, -TIE), torch.inf)


def cross_entropy(model: Model, labels: Tensor, loss: Loss = cross_entropy_loss) -> Objective:
    """The loss of each image at its true label."""

    def objective(images: Tensor) -> Tensor:
        return loss(model(images), labels)

    return objective


def refuse_inference() -> None:
    """Raise ConfigError inside ``torch.inference_mode()``."""
    if torch.is_inference_mode_enabled():
        raise ConfigError("attacks need gradients, which torch.inference_mode() forbids: use torch.no_grad()")


def value_and_grad(objective: Objective) -> ValueAndGrad:
    """Values and gradient of an objective. The gradient is zero where nothing, or nothing finite, leads back.

    Raises ConfigError inside ``torch.inference_mode()``, where there are no gradients and an attack would do nothing.
    """

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        refuse_inference()
        with torch.enable_grad():
            asked = images.detach().requires_grad_(True)
            values = objective(asked)
            if not values.requires_grad:
                return values.detach(), torch.zeros_like(images)
            (gradient,) = torch.autograd.grad(values.sum(), asked, allow_unused=True)
        found = torch.zeros_like(images) if gradient is None else torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
        return values.detach(), found

    return both


def projected_ascent(
    both: ValueAndGrad,
    start: Tensor,
    center: Tensor,
    threat: Threat,
    steps: int,
    step_size: float,
) -> Tensor:
    """Projected ascent from ``start`` within ``threat`` around ``center``: -> the last iterate (N, C, H, W), detached.

    The best of all by a noisy value is the one that met the luckiest draws, and weaker than the last.
    """
    reached = start.detach()
    for _ in range(steps):
        _, gradient = both(reached)
        reached = threat.project(reached + step_size * threat.direction(gradient), center)
    return reached


def _better(best: Tensor, highest: Tensor | None, found: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.nan_to_num(values, torch.inf, torch.inf, -torch.inf)  # an answer that is no number is wrong
    if highest is None:
        return found, values
    higher = values > highest
    return torch.where(higher[:, None, None, None], found, best), torch.where(higher, values, highest)


def strongest(values_of: Callable[[Tensor], Tensor], candidates: Iterable[Tensor]) -> Tensor:
    """Of several sets of images, each image's of the highest value (the best of an attack's restarts)."""
    best, highest = None, None
    for found in candidates:
        values = values_of(found)
        best, highest = _better(found if best is None else best, highest, found, values)
    if best is None:
        raise ValueError("need at least one candidate")
    return best


def fgsm(model: Model, images: Tensor, labels: Tensor, threat: Threat) -> Tensor:
    """One step of the full radius (Goodfellow et al. 2015): (N, C, H, W), (N,) -> (N, C, H, W)."""
    return projected_ascent(value_and_grad(cross_entropy(model, labels)), images, images, threat, 1, threat.epsilon)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    steps: int,
    step_size: float,
    uniform: Tensor | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al. 2018): (N, C, H, W), (N,) -> (N, C, H, W).

    ``uniform`` in [0, 1), shaped like ``images``, gives a random start; without it the ascent starts at the images.
    """
    start = images if uniform is None else threat.start(images, uniform)
    return projected_ascent(value_and_grad(cross_entropy(model, labels)), start, images, threat, steps, step_size)


def mi_fgsm(
    both: ValueAndGrad, images: Tensor, threat: Threat, steps: int, step_size: float, decay: float = 1.0
) -> Tensor:
    """Momentum iterative FGSM (Dong et al. 2018) from the images: (N, C, H, W) -> (N, C, H, W).

    Each gradient is divided by its mean absolute value before it joins the momentum; a zero gradient stays zero.
    """
    reached, momentum = images.detach(), torch.zeros_like(images)
    for _ in range(steps):
        momentum = decay * momentum + _unit(both(reached)[1])
        reached = threat.project(reached + step_size * threat.direction(momentum), images)
    return reached


def vni_fgsm(
    both: ValueAndGrad,
    images: Tensor,
    threat: Threat,
    steps: int,
    step_size: float,
    uniform: Callable[[], Tensor],
    decay: float = 1.0,
    samples: int = 20,
    beta: float = 1.5,
) -> Tensor:
    """Variance-tuned Nesterov iterative FGSM (Wang and He 2021) from the images: (N, C, H, W) -> (N, C, H, W).

    The gradient at the look-ahead point is corrected by its mean difference to ``samples`` neighbors, random points of
    the ball of ``beta`` times the radius, from draws of ``uniform``: in [0, 1), shaped like ``images``.
    """
    reached, momentum, variance = images.detach(), torch.zeros_like(images), torch.zeros_like(images)
    near = threat.unclipped(beta)
    for _ in range(steps):
        gradient = both(reached + decay * step_size * threat.ahead(momentum))[1]
        momentum = decay * momentum + _unit(gradient + variance)
        around = torch.zeros_like(images)
        for _ in range(samples):
            around += both(near.start(reached, uniform()))[1]
        variance = around / samples - gradient
        reached = threat.project(reached + step_size * threat.direction(momentum), images)
    return reached


def _unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of each pair of logits, in nats: (N, classes), (N, classes) -> (N,)."""
    log_p, log_q = F.log_softmax(reference.float(), dim=1), F.log_softmax(other.float(), dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def kl_ascent(
    model: Model, images: Tensor, reference: Tensor, threat: Threat, steps: int, step_size: float, normal: Tensor
) -> Tensor:
    """Images near ``images`` whose prediction is farthest from ``reference`` in KL(reference || .).

    (N, C, H, W), logits (N, classes) -> (N, C, H, W). It starts at ``images + 1e-3 * normal``: the gradient of the
    divergence vanishes at the images themselves. TRADES (Zhang et al. 2019) and Eq. 4 craft so.
    """

    def objective(candidates: Tensor) -> Tensor:
        return kl_divergence(reference, model(candidates))

    return projected_ascent(value_and_grad(objective), images + 1e-3 * normal, images, threat, steps, step_size)
