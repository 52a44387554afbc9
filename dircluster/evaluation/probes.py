"""What a defense is asked on images that nobody attacks: does it answer, and differentiate, as a function does?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.gradient import Loss, Model, cross_entropy_loss, margin_loss
from dircluster.evaluation.victim import VictimModel
from dircluster.evaluation.watch import VANISHED

CALLS, ASKED = 100, 4
"""Calls of the same images in a row, and how many of these."""
SMALL = 8
"""Images that pass together where the number is to be small."""
TOLERANCE = 0.05
"""By how much of the spread of an image's logits rounding may move them."""
EXACT, WALK = 1e-3, 4
"""The same where the batch is the same too, and the steps of a walk of one radius."""
STEP = 1 / 16
"""The step that a gradient is compared over, in radii of the threat."""
FACTOR = 3.0
"""By what factor the loss may move more, or less, than the gradient says."""
DIRECTIONS, UNEXPLAINED = 16, 0.2
"""Steps of random signs, and of their squared effects the share that a gradient may leave unexplained."""


@dataclass(frozen=True)
class Question:
    """Images (N, C, H, W) with labels (N,), asked of a victim whose draws are ``randomness``."""

    victim: VictimModel
    randomness: str
    seed: int
    epsilon: float
    draws: int
    """Over which a gradient is averaged."""
    most_rows: int

    def held(self) -> Model:
        """Images -> logits, the draws held fixed, and the same for all images where they are rows."""
        return self.victim.model("fixed", self.seed)


Probe = Callable[[Question, Tensor, Tensor], Tensor]
"""The question, images (N, C, H, W), labels (N,) -> which images pass, (N,) bool."""


def has_gradient(question: Question, images: Tensor, labels: Tensor) -> Tensor:
    """Whether a gradient leads back that is a number in all elements, and one that does not vanish.

    Images (N, C, H, W) in [0, 1], labels (N,) -> (N,) bool.
    """
    model = question.victim.model(question.randomness, question.seed)
    summed = torch.zeros_like(images)
    for _ in range(question.draws):
        summed = summed + _gradient(model, images, labels, cross_entropy_loss)
    peaks = summed.abs().flatten(1).amax(dim=1)  # NaN where one element is
    return (peaks > VANISHED) & (peaks < torch.inf)


def follows_gradient(question: Question, images: Tensor, labels: Tensor) -> Tensor:
    """Whether a small step moves the margin as its gradient says, within a factor of three.

    The step follows the gradient's signs, and random ones where it is zero. It starts near the image, away from ties
    of equal pixels, and stays in the pixel range. Of what steps of random signs do, the gradient must explain most: one
    of some pixels alone, or of one branch of two, does not. An image without a gradient passes: another probe names it.

    Images (N, C, H, W) in [0, 1], labels (N,) -> (N,) bool.
    """
    model, epsilon = question.held(), question.epsilon
    generator = rng.generator(question.seed, "slope")

    def uniform() -> Tensor:
        """In [-1, 1), shaped as the images."""
        return 2 * torch.rand(images.shape, generator=generator).to(images) - 1

    start = (images + epsilon / 2 * uniform()).clamp(0.0, 1.0)
    gradient = _gradient(model, start, labels, margin_loss)

    def along(signs: Tensor) -> tuple[Tensor, Tensor]:
        """By how much the gradient says that the margin moves, and by how much it does."""
        ahead, behind = ((start + way * epsilon * STEP * signs).clamp(0.0, 1.0) for way in (1, -1))
        said = (gradient * (ahead - behind)).flatten(1).sum(dim=1)
        return said, margin_loss(model(ahead), labels) - margin_loss(model(behind), labels)

    said, moved = along(torch.where(gradient == 0, uniform(), gradient).sign())
    within = (moved > said / FACTOR) & (moved < said * FACTOR)
    steps = [along(uniform().sign()) for _ in range(DIRECTIONS)]
    missed = torch.stack([(moved - said).square() for said, moved in steps]).sum(dim=0)
    within &= missed <= UNEXPLAINED * torch.stack([moved.square() for _, moved in steps]).sum(dim=0)
    return within | (gradient.abs().flatten(1).amax(dim=1) <= VANISHED)


def alike_with_gradients(question: Question, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the logits of images (N, C, H, W) are the same while gradients are recorded, (N,) bool."""
    model = question.held()
    plain = model(images)
    with torch.enable_grad():
        recorded = model(images.detach().requires_grad_(True))
    return same(plain, recorded.detach())


def alike_in_company(question: Question, images: Tensor, labels: Tensor) -> Tensor:
    """Whether an image's logits are the same beside other images, which are the negatives of those beside it.

    Images (N, C, H, W) in [0, 1] -> (N,) bool.
    """
    model = question.held()
    plain = model(images)
    even = torch.arange(len(images), device=images.device) % 2 == 0
    found = torch.ones_like(even)
    for kept in (even, ~even):
        beside = model(torch.where(kept[:, None, None, None], images, 1 - images))
        found = torch.where(kept, same(plain, beside), found)
    return found


def alike_in_numbers(question: Question, images: Tensor, labels: Tensor) -> Tensor:
    """Whether an image's logits are the same alone and in batches of every size up to what attacks pass together.

    Images (N, C, H, W) in [0, 1] -> (N,) bool.
    """
    model, count = question.held(), len(images)
    few = torch.cat([model(images[first : first + SMALL]) for first in range(0, count, SMALL)])
    many = model(images.repeat(max(1, question.most_rows // count), 1, 1, 1))[:count]
    found = same(few, many)
    alone = [model(images[i : i + 1]) for i in range(min(ASKED, count))]
    batches = [model(images[:size]) for size in _sizes(count)]
    for part in (torch.cat(alone), *batches):
        found[: len(part)] &= same(few[: len(part)], part)
    return found


def _sizes(count: int) -> list[int]:
    """2, 3, 4, 6, 8, 12, ...: no size is far from one of these."""
    return [size for power in range(1, count.bit_length()) for size in (2**power, 3 * 2 ** (power - 1)) if size < count]


def alike_each_time(question: Question, images: Tensor, labels: Tensor) -> Tensor:
    """Whether the logits of a few images stay what they are over many calls; one answer for all images.

    They must be the same too after images that lie near, as an attack passes one after another, and after others.
    Images (N, C, H, W) in [0, 1] -> (N,) bool.
    """
    model, few = question.victim.model("fresh", question.seed), images[:ASKED]
    first = model(few)
    calls = [same(first, model(few)).all() for _ in range(CALLS - 1)]
    signs = torch.rand(few.shape, generator=rng.generator(question.seed, "walk")).to(few).sub(0.5).sign()
    walk = [(few + question.epsilon * step / WALK * signs).clamp(0.0, 1.0) for step in range(1, WALK + 1)]
    reached = [model(near) for near in walk][-1]
    model(1 - few)
    calls.append(same(reached, model(walk[-1]), EXACT).all())
    return torch.stack(calls).all().expand(len(images))


def same(one: Tensor, other: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Which rows of logits (N, classes) are the same but for rounding, (N,) bool; NaN equals NaN."""
    one, other = (torch.nan_to_num(logits) for logits in (one, other))
    spread = one.amax(dim=1) - one.amin(dim=1)
    return (one - other).abs().amax(dim=1) <= tolerance * spread + 1e-6 * one.abs().amax(dim=1)


def _gradient(model: Model, images: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """The loss's gradient at images (N, C, H, W), of their shape, as it comes back; zero where none does."""
    with torch.enable_grad():
        asked = images.detach().requires_grad_(True)
        values = loss(model(asked), labels)
        if not values.requires_grad:
            return torch.zeros_like(images)
        (gradient,) = torch.autograd.grad(values.sum(), asked, allow_unused=True)
    return torch.zeros_like(images) if gradient is None else gradient


PROBES: dict[str, Probe] = {
    "gradient": has_gradient,
    "slope": follows_gradient,
    "recorded": alike_with_gradients,
    "company": alike_in_company,
    "numbers": alike_in_numbers,
    "repeats": alike_each_time,
}
"""Probes by the name that specs know them by."""
