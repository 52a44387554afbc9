"""Counts, while an attack runs, what tells that it may have been weak."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dircluster.attacks.gradient import Model, ValueAndGrad
from dircluster.evaluation.marks import WORDS, Kind

TENTH, ALONG = 0.1, 0.3
"""A loss that rises by less than so much of what the gradient says of the first step is flat, where that step goes
along the gradient: as far as so much of the farthest one.
"""
VANISHED = 1e-30
"""A gradient whose largest element is below this counts as none: smaller ones float32 does not hold whole."""


class Watch:
    """Counts what passes between an attack on ``images`` images and its model. Sums stay on the device until read.

    Each pass of an image that asks for a gradient counts, and is bad where none comes back in the first backward pass.
    Rows that are whole repetitions of the images, as those of EOT are, count as images: one draw that leads back is
    enough. So do ``draws`` passes of the images one after another.
    """

    def __init__(self, images: int, draws: int = 1) -> None:
        self.images, self.draws = images, draws
        self._passes = 0
        self._peaks: Tensor | None = None
        """The largest elements that came back to each image in this draw and those before it."""
        self._sums: dict[Kind, list[Tensor | int]] = {kind: [0, 0] for kind in WORDS}
        self._start: tuple[Tensor, Tensor] | None = None
        self._first: Tensor | None = None
        self._last: Tensor | None = None

    def over(self, model: Model) -> Model:
        """``model``, watched: (N, C, H, W) -> (N, classes)."""

        def watched(images: Tensor) -> Tensor:
            asked = torch.is_grad_enabled() and images.requires_grad
            if not asked:
                return self._answered(model(images))
            entered: Tensor = _Entrance.apply(images, self)
            if self._passes % self.draws == 0:
                self._add("gradient", 0, self._groups(len(images)))
                self._peaks = None
            self._passes += 1
            return self._answered(model(entered))

        return watched

    def ascent(self, both: ValueAndGrad) -> ValueAndGrad:
        """``both``, its first values compared to the next and the last: one start of an attack that raises them."""
        self._close()

        def watched(images: Tensor) -> tuple[Tensor, Tensor]:
            values, gradient = both(images)
            if self._first is None:
                self._first, self._start = values, (images, gradient)
            else:
                self._step(values - self._first, images)
                self._last = values
            return values, gradient

        return watched

    def counts(self) -> dict[str, tuple[int, int]]:
        """(bad, total) of each kind that was seen."""
        self._close()
        dead = [self._sums["gradient"][1] - self._sums["gradient"][0], self._sums["gradient"][1]]
        found = {**self._sums, "gradient": dead}
        return {kind: (int(bad), int(total)) for kind, (bad, total) in found.items() if int(total)}

    def _answered(self, logits: Tensor) -> Tensor:
        self._add("finite", (~logits.detach().isfinite()).any(dim=1).sum(), len(logits))
        return logits

    def _returned(self, gradient: Tensor) -> None:
        peaks = gradient.detach().abs().flatten(1).amax(dim=1)  # NaN where one element is
        if len(peaks) > self.images == self._groups(len(peaks)):
            peaks = peaks.view(-1, self.images).amax(dim=0)
        good: Tensor | int = 0
        if self.draws > 1 and self._peaks is not None and len(self._peaks) == len(peaks):
            good, peaks = _returned_to(self._peaks), torch.maximum(self._peaks, peaks)
        self._peaks = peaks
        self._add("gradient", _returned_to(peaks) - good, 0)

    def _groups(self, rows: int) -> int:
        return self.images if rows and rows % self.images == 0 else rows

    def _step(self, rose: Tensor, images: Tensor) -> None:
        """Compare by how much the values ``rose``, (N,), in the first step to what the gradient promised."""
        if self._start is None:
            return
        (start, gradient), self._start = self._start, None
        moved = images - start
        promised = (gradient * moved).flatten(1).sum(dim=1)
        farthest = gradient.abs().flatten(1).sum(dim=1) * moved.abs().flatten(1).amax(dim=1)
        along = (promised > ALONG * farthest) & (promised > 1e-3)
        self._add("slope", (along & (rose < TENTH * promised)).sum(), along.sum())

    def _close(self) -> None:
        if self._first is not None and self._last is not None:
            first, last = (torch.nan_to_num(v, torch.inf, torch.inf, -torch.inf) for v in (self._first, self._last))
            self._add("ascent", (last < first - 1e-4).sum(), len(first))
        self._first = self._last = self._start = None

    def _add(self, kind: Kind, one: Tensor | int, two: Tensor | int) -> None:
        sums = self._sums[kind]
        sums[0], sums[1] = sums[0] + one, sums[1] + two


def _returned_to(peaks: Tensor) -> Tensor:
    """How many images have a gradient, by its largest elements (N,)."""
    return ((peaks > VANISHED) & (peaks < torch.inf)).sum()


class _Entrance(torch.autograd.Function):
    """The identity, whose backward pass shows a watch what comes back."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, watch: Watch) -> Tensor:
        ctx.watch, ctx.first = watch, True
        return images.view_as(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if ctx.first:
            ctx.watch._returned(gradients[0])
        ctx.first = False
        return gradients[0], None


class Unwatched:
    """A watch that sees nothing."""

    def over(self, model: Model) -> Model:
        return model

    def ascent(self, both: ValueAndGrad) -> ValueAndGrad:
        return both
