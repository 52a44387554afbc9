"""Faults that were planted after the verdict had been written, and honest modules that it had not met."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.config import DataConfig
from dircluster.data.sources import load
from tests.unit.evaluation.planted import (
    GRADIENT,
    NUMBERS,
    REPEATS,
    SLOPE,
    Make,
    around,
    backward,
    blurred,
    straight_through,
)

REFUSED = "the defense draws from a random stream of its own"
"""Not a question: such a module is not judged at all."""


class Cached(nn.Module):
    """Gives its last answer again to images that lie near the last ones."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        kept = self.last
        if kept and kept[0].shape == images.shape and torch.allclose(kept[0], images, atol=0.08):
            return kept[1]
        logits: Tensor = self.inner(images)
        self.last = (images.detach().clone(), logits.detach())
        return logits


class Resized(nn.Module):
    """Resizes to a size that a generator of its own draws, and back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.generator = inner, torch.Generator().manual_seed(0)

    def forward(self, images: Tensor) -> Tensor:
        size = int(torch.randint(6, 11, (), generator=self.generator))
        small = F.interpolate(images, size=(size, size), mode="bilinear")
        made: Tensor = self.inner(F.interpolate(small, size=images.shape[2:], mode="bilinear"))
        return made


class Tires(nn.Module):
    """Detaches its input from the fortieth call on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        made: Tensor = self.inner(images if self.calls < 40 else images.detach())
        return made


class Nearest(nn.Module):
    """Sees the test image next to its input, straight through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.known = inner, load(DataConfig(), 0).test.pixels(slice(128))

    def forward(self, images: Tensor) -> Tensor:
        found = torch.cdist(images.flatten(1), self.known.flatten(1)).argmin(dim=1)
        made: Tensor = self.inner(straight_through(images, self.known[found]))
        return made


def detached_top(h: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = h(x)
    return torch.where(logits == logits.amax(dim=1, keepdim=True), logits.detach(), logits)


def clamped(h: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = h(x)
    middle = logits.topk(2, dim=1).values.mean(dim=1, keepdim=True)
    return 1e4 * (logits - middle).clamp(-1e-3, 1e-3)


def signs(h: nn.Module, x: Tensor) -> Tensor:
    """Hidden units as zero or their mean, with a hundredth of the identity for the backward pass."""
    assert isinstance(h, nn.Sequential)
    hidden = h[:2](x)
    made: Tensor = h[3](straight_through(0.01 * hidden, (hidden > 0) * hidden.detach().abs().mean(dim=1, keepdim=True)))
    return made


def grid_alone(h: nn.Module, x: Tensor) -> Tensor:
    """A gradient for images of 8 bits, which those of an attack are not."""
    logits: Tensor = h(x)
    between = (x * 255 - (x * 255).round()).abs().flatten(1).amax(dim=1, keepdim=True)
    return torch.where(between > 0.01, logits.detach(), logits)


def by_clock(h: nn.Module, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(time.time_ns() % 2**31)
    made: Tensor = h(x + 0.3 * torch.randn(x.shape, generator=generator))
    return made


def by_image(h: nn.Module, x: Tensor) -> Tensor:
    """Noise whose seed is a sum over the image."""
    sums = (x.detach().flatten(1).double() @ torch.linspace(1, 2, x[0].numel()).double() * 1e6).long()
    drawn = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed % 2**31)) for seed in sums.tolist()]
    made: Tensor = h(x + 0.3 * torch.stack(drawn))
    return made


def other_in_the_middle(h: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = h(x)
    return logits.roll(1, dims=1) if 10 <= len(x) <= 40 else logits


def every_other_pixel(gradient: Tensor) -> Tensor:
    rows, columns = (torch.arange(size) for size in gradient.shape[2:])
    return gradient * ((rows[:, None] + columns) % 2)


def largest_tenth(gradient: Tensor) -> Tensor:
    limit = gradient.abs().flatten(1).quantile(0.9, dim=1)[:, None, None, None]
    return gradient * (gradient.abs() >= limit)


def drowned(gradient: Tensor) -> Tensor:
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(len(gradient)))
    return gradient + 10 * gradient.flatten(1).std(dim=1)[:, None, None, None] * noise


LATER_FAULTS: dict[str, tuple[Make, str]] = {
    "the largest logit is detached": (around(detached_top), SLOPE),
    "logits clamped and scaled": (around(clamped), GRADIENT),
    "signs, straight through at a wrong scale": (around(signs), SLOPE),
    "one of two branches is detached": (around(lambda h, x: h(x.detach()) + 0.2 * h(x.flip(3))), SLOPE),
    "256 levels": (around(lambda h, x: h((255 * x).round() / 255)), GRADIENT),
    "one-hot answers": (around(lambda h, x: 10 * F.one_hot(h(x).argmax(1), 10).float()), GRADIENT),
    "the last answer is kept": (Cached, REPEATS),
    "a random size from a generator of its own": (Resized, REFUSED),
    "noise by the clock": (around(by_clock), REFUSED),
    "a gradient of 1e-24": (backward(lambda g: 1e-24 * g), SLOPE),
    "other answers in batches of 10 to 40": (around(other_in_the_middle), NUMBERS),
    "a gradient at images of 8 bits alone": (around(grid_alone), GRADIENT),
    "a gradient in forty calls alone": (Tires, GRADIENT),
    "a gradient at every other pixel": (backward(every_other_pixel), SLOPE),
    "a gradient at a tenth of the pixels": (backward(largest_tenth), SLOPE),
    "a smoothed gradient": (backward(blurred), SLOPE),
    "noise that the image seeds": (around(by_image), SLOPE),
    "the nearest known image, straight through": (Nearest, SLOPE),
    "a gradient drowned in noise": (backward(drowned), SLOPE),
}
"""By name: the module over an honest one, and the check that names its fault."""


def transformed(x: Tensor) -> Tensor:
    """Cosine transform of 8 x 8 pixels, small coefficients shrunk as JPEG does, and back."""
    k = torch.arange(8.0)
    cosine = 0.5 * torch.cos(torch.pi * (2 * k + 1) * k[:, None] / 16)
    cosine[0] /= 2**0.5
    found, step = cosine @ x @ cosine.T, 0.05 * (1 + k[:, None] + k)
    return cosine.T @ (found - step / 2 * torch.tanh(found / step)) @ cosine


class Normalized(nn.Module):
    """Normalizes inside, as RobustBench's models do, and gives logarithms of probabilities."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(0.3))
        self.register_buffer("std", torch.tensor(0.4))

    def forward(self, images: Tensor) -> Tensor:
        normal = (images - self.mean) / self.std
        made: Tensor = self.inner(normal * self.std + self.mean)
        return made.log_softmax(dim=1)


def of_three(h: nn.Module, x: Tensor) -> Tensor:
    views = (x, 0.5 * x + 0.5 * blurred(x), 0.9 * x + 0.05)
    return torch.stack([h(view).softmax(dim=1) for view in views]).mean(dim=0).log()


LATER_HONEST: dict[str, Make] = {
    "normalized inside": Normalized,
    "small frequencies shrunk": around(lambda h, x: h(transformed(x))),
    "an average of three": around(of_three),
    "256 levels, straight through": around(lambda h, x: h(straight_through(x, (255 * x).round() / 255))),
    "one pixel in twenty dropped by a function": around(lambda h, x: h(F.dropout(x, 0.05))),
    "half of the pixels dropped by a function": around(lambda h, x: h(F.dropout(x, 0.5))),  # its rows say fresh draws
}
