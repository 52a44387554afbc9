"""AutoPGD (Croce and Hein 2020) on any loss, and what it is the engine of: MALT, PMA, and AutoAttack's `rand`.

The ascent is pyautoattack's. Around it, draws of a step pass side by side, and an image that is fooled costs no further
pass. Starts are drawn from PyTorch's own stream, which is seeded here and put back: the model must draw from another.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.expectation import averaged_logits, expected, expected_with_logits
from dircluster.attacks.gradient import Loss, Model, cross_entropy_loss, margin_loss, surely
from dircluster.attacks.threat import L2, LInf

TARGETS = 5
"""Classes that all survivors meet in MALT."""
MOST_TARGETS = 9
"""Classes that the nearest survivors meet in MALT, as many as its authors take of 1,000, and AutoAttack of any."""
NEAREST, LONGER = 1 / 5, 3
"""The share of survivors that MALT's second round is for, and how many times the steps of the first it has. On one
defense of seven a tenth left 0.8 points more than AutoAttack, a fifth 0.3; twice the steps change nothing."""
CANDIDATES = 100
"""Classes among which MALT ranks: those of the highest logits."""
CHEAP = 5
"""MALT's first ascent, towards no class, has this part of the steps: what it fools meets no other."""
SURVIVORS = 2 / 3
"""The share of images that is taken to survive, where what an attack costs is foretold."""


def probability_margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """max over k != y of p_k, minus p_y (Xie et al. 2024): (N, classes), (N,) -> (N,), in [-1, 1]."""
    return margin_loss(logits.float().softmax(dim=1), labels)


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, of three classes or more: (N, classes), (N,) -> (N,). It has no scale."""
    ordered = logits.float().sort(dim=1).values
    return margin_loss(logits.float(), labels) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def targeted_loss(target: Tensor) -> Loss:
    """The targeted difference of logits ratio towards ``target`` (N,); of fewer than four classes the difference."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.float()
        toward = target.repeat(len(logits) // len(target))
        gap = (logits.gather(1, toward[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
        if logits.shape[1] < 4:
            return gap
        ordered = logits.sort(dim=1).values
        return gap / (ordered[:, -1] - (ordered[:, -3] + ordered[:, -4]) / 2 + 1e-12)

    return loss


CROSS_ENTROPY, DLR = -1, -2
"""What an ascent may aim at instead of a class: a loss that names none."""


def aimed_loss(aim: Tensor) -> Loss:
    """Each image's own loss by its ``aim`` (N,): :func:`targeted_loss` towards a class, CROSS_ENTROPY, or DLR."""
    kinds: dict[int, Loss] = {CROSS_ENTROPY: cross_entropy_loss, DLR: dlr_loss}
    asked = [kind for kind in kinds if bool((aim == kind).any())]
    toward = targeted_loss(aim.clamp_min(0))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        repeated, values = aim.repeat(len(logits) // len(aim)), toward(logits, labels)
        for kind in asked:
            values = torch.where(repeated == kind, kinds[kind](logits, labels), values)
        return values

    return loss


class _NobodyLeft(Exception):
    """No error: it ends an ascent."""


def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: LInf | L2,
    loss_of: Callable[[Tensor], Loss],
    steps: int,
    draws: int = 1,
    most_rows: int | None = None,
    leave: bool = True,
    copies: int = 1,
) -> tuple[Tensor, Tensor]:
    """AutoPGD from a random start: (N, C, H, W), (N,) -> each image's of the highest margin, and that margin (N,).

    ``loss_of`` gives the loss of the images at given rows. The margin, and whether an image is fooled, are those of the
    probabilities averaged over ``draws`` passes. With ``leave`` an image that is fooled passes no more, nor do the
    other ``copies`` of it that stand side by side.
    """
    from pyautoattack.autopgd_base import APGDAttack

    best, highest = images.clone(), torch.full((len(images),), -torch.inf, device=images.device)
    losses: list[Tensor] = []

    def passed(candidates: Tensor) -> Tensor:
        """Logits, as the library asks; its loss follows, whose gradient is the one that was averaged here."""
        fooled = (highest >= 0).view(-1, copies).any(dim=1).repeat_interleave(copies)
        rows = (~fooled if leave else torch.ones_like(fooled)).nonzero()[:, 0]
        if len(rows) == 0:
            raise _NobodyLeft
        at = candidates.detach()
        some, steep, logits = expected_with_logits(model, labels[rows], draws, loss_of(rows), most_rows)(at[rows])
        seen = averaged_logits(logits).float()
        margin = surely(margin_loss(seen, labels[rows]), seen, labels[rows])
        higher = margin > highest[rows]
        better = rows[higher]
        best[better], highest[better] = at[better], margin[higher]
        values = torch.zeros(len(images), device=images.device).index_copy(0, rows, some.float())
        gradient = torch.zeros_like(at).index_copy(0, rows, steep.to(at))
        losses[:] = [values + ((candidates - at) * gradient).flatten(1).sum(dim=1)]
        return torch.zeros(len(images), seen.shape[1], device=images.device).index_copy(0, rows, seen)

    class AnyLoss(APGDAttack):  # type: ignore[misc,no-any-unimported]
        def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
            return losses[0]

    norm = "Linf" if isinstance(threat, LInf) else "L2"
    logger = logging.getLogger("auto-attack")
    attack: Any = AnyLoss(passed, steps, norm, eps=threat.epsilon, loss="dlr", device=images.device, logger=logger)
    attack.init_hyperparam(images)
    with contextlib.suppress(_NobodyLeft):
        attack.attack_single_run(images, labels)
    return best, highest


class Survivors:
    """Images that no attack has fooled yet, and the strongest found of each: one attack after another faces them.

    Without ``leave`` all stay: where a model draws again one pass shows little, and somebody's fixed draws are those of
    the whole batch.
    """

    def __init__(self, images: Tensor, labels: Tensor, leave: bool) -> None:
        self.images, self.labels, self.leave = images.detach(), labels, leave
        self.chosen = torch.ones(len(images), dtype=torch.bool, device=images.device)
        self.best = self.images.clone()
        self.margin = torch.full((len(images),), -torch.inf, device=images.device)

    @property
    def rows(self) -> Tensor:
        """Which images are left, (n,)."""
        left = self.chosen & (self.margin < 0) if self.leave else self.chosen
        return left.nonzero()[:, 0]

    def narrow(self, share: float) -> None:
        """From here on face ``share`` of those that are left alone, the nearest to being fooled."""
        rows = self.rows
        near = rows[self.margin[rows].topk(math.ceil(share * len(rows))).indices]
        self.chosen = torch.zeros_like(self.chosen).index_fill(0, near, True)

    def face(self, attack: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """``attack`` takes images, labels and rows of those that are left, and returns images and margins."""
        rows = self.rows
        if len(rows) == 0:
            return
        found, margin = attack(self.images[rows], self.labels[rows], rows)
        better = margin > self.margin[rows]
        self.best[rows[better]] = found[better]
        self.margin[rows[better]] = margin[better]


def ascents(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: LInf | L2,
    losses: Sequence[Loss],
    steps: int,
    seed: int,
    draws: int = 1,
    most_rows: int | None = None,
    leave: bool = True,
) -> Tensor:
    """One AutoPGD after the other on ``losses``: (N, C, H, W), (N,) -> (N, C, H, W).

    On the margin of probabilities alone this is PMA; on cross-entropy and DLR with ``draws`` AutoAttack's `rand`,
    where it would keep natural images of those that it does not surely fool: here the strongest found is kept.
    """
    left = Survivors(images, labels, leave)

    def ascend(loss: Loss, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return apgd(model, x, y, threat, lambda some: loss, steps, draws, most_rows, leave)

    with rng.seeded_torch_rng(seed, "apgd"):
        for loss in losses:
            left.face(partial(ascend, loss))
    return left.best


def malt(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: LInf | L2,
    steps: int,
    seed: int,
    targets: int = TARGETS,
    draws: int = 1,
    most_rows: int | None = None,
    leave: bool = True,
) -> Tensor:
    """MALT (Melamed et al. 2024), targeted AutoPGD, its targets ranked: (N, C, H, W), (N,) -> (N, C, H, W).

    The cheap ascent comes first, towards no class. What survives meets its ``targets`` nearest classes, and the fifth
    of what is left that came nearest to being fooled a second, longer round: AutoPGD on cross-entropy, on DLR, and
    towards up to nine classes. There is none where images may not ``leave``. Those that may face all classes side by
    side, others one after the other.
    """
    left = Survivors(images, labels, leave)

    def ascend(
        x: Tensor, y: Tensor, loss_of: Callable[[Tensor], Loss], count: int, copies: int = 1
    ) -> tuple[Tensor, Tensor]:
        return apgd(model, x, y, threat, loss_of, count, draws, most_rows, leave, copies)

    def untargeted(x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return ascend(x, y, lambda some: margin_loss, max(1, steps // CHEAP))

    def aimed(aims: Tensor, count: int, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        copies, aim = aims.shape[1], aims[rows].flatten()
        repeated = x.repeat_interleave(copies, dim=0), y.repeat_interleave(copies)
        found, margin = ascend(*repeated, lambda some: aimed_loss(aim[some]), count, copies)
        best = margin.view(-1, copies).argmax(dim=1) + copies * torch.arange(len(x), device=x.device)
        return found[best], margin[best]

    def face(aims: Tensor, count: int) -> None:
        """All of ``aims`` (N, k), as many at a time as ``most_rows`` and what a batch may hold allow."""
        fitting = aims.shape[1] if most_rows is None else max(1, most_rows // max(1, len(left.rows)))
        for some in torch.split(aims, fitting if leave else 1, dim=1):
            left.face(partial(aimed, some, count))

    with rng.seeded_torch_rng(seed, "malt"):
        left.face(untargeted)
        rows = left.rows
        if len(rows) == 0:
            return left.best
        nearest = nearest_classes(model, images[rows], labels[rows], MOST_TARGETS, draws, most_rows)
        every = torch.zeros((len(images), nearest.shape[1]), dtype=torch.int64, device=images.device)
        every[rows] = nearest
        face(every[:, :targets], steps)
        if leave:
            left.narrow(NEAREST)
            losses = torch.tensor([CROSS_ENTROPY, DLR] if nearest.shape[1] > 1 else [CROSS_ENTROPY])
            face(torch.cat([losses.to(every).expand(len(every), -1), every], dim=1), LONGER * steps)
    return left.best


def malt_gradients(steps: int, classes: int, survivors: float = SURVIVORS, targets: int = TARGETS) -> float:
    """Gradients that :func:`malt` takes for an image and draw where images may leave, as foretold.

    ``survivors`` is the share of images that its first ascent is taken to leave.
    """
    others = classes - 1
    ranking, second = 1 + min(CANDIDATES, others), min(MOST_TARGETS, others) + (2 if others > 1 else 1)
    rounds = min(targets, others) * (steps + 1) + NEAREST * second * (LONGER * steps + 1)
    return max(1, steps // CHEAP) + 1 + survivors * (ranking + rounds)


def nearest_classes(
    model: Model, images: Tensor, labels: Tensor, count: int, draws: int = 1, most_rows: int | None = None
) -> Tensor:
    """Classes by the distance at which a linear model reaches them: (N, C, H, W), (N,) -> (N, count), nearest first.

    The distance is (z_y - z_k) / |grad z_y - grad z_k|: mesoscopic linearity. Only classes of the highest logits are
    asked, a pass each. There are fewer than ``count`` where there are fewer classes.
    """
    logits = averaged_logits(expected_with_logits(model, labels, draws, margin_loss, most_rows)(images)[2])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    candidates = others.topk(min(CANDIDATES, logits.shape[1] - 1), dim=1).indices
    distances = []
    for candidate in candidates.unbind(dim=1):

        def gap(z: Tensor, y: Tensor, candidate: Tensor = candidate) -> Tensor:
            toward = candidate.repeat(len(z) // len(candidate))
            return (z.gather(1, y[:, None]) - z.gather(1, toward[:, None]))[:, 0].float()

        values, gradient = expected(model, labels, draws, gap, most_rows)(images)
        distances.append(values / gradient.flatten(1).norm(dim=1).clamp_min(1e-12))
    order = torch.stack(distances, dim=1).argsort(dim=1)
    return candidates.gather(1, order[:, :count])


@contextlib.contextmanager
def listening(lines: list[str]) -> Iterator[None]:
    """Collect the warnings of the library, each once; it speaks only through its logger."""
    logger = logging.getLogger("auto-attack")

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage().split(" See flags_doc.md")[0]
            if record.levelno >= logging.WARNING and line not in lines:
                lines.append(line)

    ear, passed_on = Ear(), logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(ear)
        logger.propagate = passed_on
