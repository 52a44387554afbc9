"""Modules with one planted fault each, and honest ones, over a small network that is trained adversarially."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster import load_defense, rng
from dircluster.attacks.gradient import kl_ascent, kl_divergence
from dircluster.attacks.threat import LInf
from dircluster.config import DataConfig
from dircluster.data.sources import load
from dircluster.defenses.base import Defended, Purifier
from tests.unit.evaluation.conftest import EPSILON

Make = Callable[[nn.Module], nn.Module]


class Around(nn.Module):
    """A module of the small network and a function of it and the images."""

    def __init__(self, inner: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.inner, images)


class Backward(torch.autograd.Function):
    """The identity with another backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


def around(function: Callable[[nn.Module, Tensor], Tensor]) -> Make:
    return lambda inner: Around(inner, function)


def backward(change: Callable[[Tensor], Tensor]) -> Make:
    return around(lambda h, x: h(Backward.apply(x, change)))


def straight_through(x: Tensor, made: Tensor) -> Tensor:
    return x + (made - x).detach()


def noise_generator() -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda gradient: torch.randn(gradient.shape, generator=generator)


def on_some_images(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(len(gradient)) % 10 != 0)[:, None, None, None]


def batch_statistics(h: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = h(x)
    return logits - logits.mean(dim=0) + 0.9 * logits.std(dim=0, correction=0)


def every_twentieth_call() -> Make:
    class Now(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images)
            return torch.randn_like(logits) if torch.rand(()) < 0.05 else logits

    return Now


class Adapts(nn.Module):
    """Answers otherwise at every eleventh call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.inner(images)
        return logits + (self.calls % 11 == 0) * torch.arange(logits.shape[1])


def nan_under_attack(h: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = h(x)
    between = (x * 255 - (x * 255).round()).abs().flatten(1).amax(dim=1, keepdim=True)  # images have 8 bits
    return torch.where(between > 0.01, torch.nan, logits)


def nan_on_some(h: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = h(x)
    return torch.where(x.flatten(1).mean(dim=1, keepdim=True) > 0.38, torch.nan, logits)


def wrong_in(share: float) -> Make:
    """Answers as another class would be answered, at random, in a share of the calls."""

    def answer(h: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = h(x)
        wrong = torch.rand(len(x), 1, device=x.device) < share
        return torch.where(wrong, logits.roll(int(torch.randint(1, 10, ())), dims=1), logits)

    return around(answer)


GRADIENT = "Do all images have a gradient?"
SLOPE = "Does the loss move as its gradient says?"
RAISED = "Does an attack raise the loss that it follows?"
SCALE = "Is cross-entropy no weaker than a loss that the scale of the logits leaves alone?"
FINITE = "Are all logits finite under attack?"
RECORDED = "Are the logits the same while gradients are recorded?"
COMPANY = "Are an image's logits the same whatever images pass beside it?"
NUMBERS = "Are an image's logits the same however many images pass together?"
REPEATS = "Are the logits of a module that seems deterministic the same at every call?"

FAULTS: dict[str, tuple[Make, str]] = {
    "a detached input": (around(lambda h, x: h(x.detach())), GRADIENT),
    "a detached leaf": (around(lambda h, x: h(x.detach().requires_grad_(True))), GRADIENT),
    "an input of five levels": (around(lambda h, x: h((4 * x).round() / 4)), GRADIENT),
    "whole logits": (around(lambda h, x: h(x).round()), GRADIENT),
    "integer logits": (around(lambda h, x: (10 * h(x)).int()), GRADIENT),
    "huge logits": (around(lambda h, x: 1e4 * h(x)), GRADIENT),
    "a softmax at temperature 1e-6": (around(lambda h, x: (h(x) / 1e-6).log_softmax(1)), GRADIENT),
    "a softmax and its logarithm": (around(lambda h, x: ((h(x) / 1e-2).softmax(1) + 1e-30).log()), GRADIENT),
    "a gradient of 1e-40": (backward(lambda g: 1e-40 * g), GRADIENT),
    "a gradient of NaN": (backward(lambda g: torch.nan * g), GRADIENT),
    "a gradient at some images": (backward(on_some_images), GRADIENT),
    "a flipped gradient": (backward(lambda g: -g), RAISED),
    "a random gradient": (backward(noise_generator()), SLOPE),
    "a gradient of other pixels": (backward(lambda g: g.flip(2)), SLOPE),
    "two levels, straight through": (around(lambda h, x: h(straight_through(x, (x > 0.5).float()))), SLOPE),
    "small logits": (around(lambda h, x: 0.01 * h(x)), SCALE),
    "logits times 0.1": (around(lambda h, x: 0.1 * h(x)), SCALE),
    "batch statistics": (around(batch_statistics), COMPANY),
    "one image differs": (around(lambda h, x: h(x) * (1 + (len(x) == 1) * torch.linspace(0, 1, 10))), NUMBERS),
    "noise in large batches": (around(lambda h, x: h(x) + (len(x) > 200) * torch.randn(len(x), 10)), NUMBERS),
    "noise where gradients flow": (
        around(lambda h, x: h(x + 0.3 * torch.randn_like(x)) if x.requires_grad else h(x)),
        RECORDED,
    ),
    "noise in one call of twenty": (every_twentieth_call(), REPEATS),
    "another answer at every eleventh call": (Adapts, REPEATS),
    "NaN under attack": (around(nan_under_attack), FINITE),
    "NaN on some images": (around(nan_on_some), FINITE),
}
"""By name: the module over an honest one, and the check that names its fault. See test_gradient_masking for others."""


def median(x: Tensor) -> Tensor:
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3).view(len(x), x.shape[1], 9, *x.shape[2:])
    return windows.median(dim=2).values


def blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)


class Residual(Purifier):
    """Takes half of the fine detail away, as HGD takes predicted noise: nothing is random."""

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        return images - 0.5 * (images - blurred(images))


class Patches(Purifier):
    """Hides some patches of 2 x 2 pixels, as DIR does, and fills them with what lies around."""

    def draw(self, generator: torch.Generator, images: int) -> Tensor | None:
        return torch.rand((images, 1, 4, 4), generator=generator)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        assert draws is not None
        hidden = (draws < 0.15).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return torch.where(hidden, blurred(images), images)


def by_trades(h: nn.Module) -> nn.Module:
    """The network after an epoch of TRADES."""
    model, train = copy.deepcopy(h), load(DataConfig(), 0).train
    optimizer, draws = torch.optim.Adam(model.parameters(), 2e-3), rng.generator(0, "tests/trades")
    images, labels = train.pixels(), train.labels
    for rows in torch.randperm(len(labels), generator=draws).split(64):
        x, normal = images[rows], torch.randn(images[rows].shape, generator=draws)
        found = kl_ascent(model, x, model(x).detach(), LInf(EPSILON), 3, EPSILON / 2, normal)
        logits = model(x)
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, labels[rows]) + 6 * kl_divergence(logits, model(found)).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


HONEST: dict[str, Make] = {
    "AT": lambda h: h,
    "TRADES": by_trades,
    "a purifier that hides patches": lambda h: Defended(Patches(), h),
    "a purifier that takes noise away": lambda h: Defended(Residual(), h),
    "noise on the input": around(lambda h, x: h(x + 0.05 * torch.randn_like(x))),
    "one answer in ten is wrong": wrong_in(0.1),
    "a median filter": around(lambda h, x: h(median(x))),
    "half of a median filter": around(lambda h, x: h(0.5 * x + 0.5 * median(x))),
    "a shipped DIR": lambda h: load_defense("zoo:digits-dir"),
    "a shipped HGD": lambda h: load_defense("zoo:digits-hgd"),
    "logarithms of probabilities": around(lambda h, x: h(x).log_softmax(1)),
    "float16": around(lambda h, x: h(x).half()),
}
