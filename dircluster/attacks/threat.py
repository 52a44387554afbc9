"""The threat model: a ball around each image, cut with the pixel range unless what is attacked is not an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Threat(Protocol):
    """What an attacker may do to an image. All tensors are (N, C, H, W)."""

    @property
    def epsilon(self) -> float:
        """Radius of the ball."""

    def project(self, candidates: Tensor, center: Tensor) -> Tensor:
        """Points of the set around ``center``, near ``candidates``."""

    def start(self, center: Tensor, uniform: Tensor) -> Tensor:
        """A random point of the set, from draws in [0, 1)."""

    def direction(self, gradient: Tensor) -> Tensor:
        """The unit step that raises a loss of this gradient most; zero where the gradient is."""


@dataclass(frozen=True)
class LInf:
    """The set S of Eq. 8: at most ``epsilon`` away in every pixel, and in [0, 1] where ``pixels`` holds."""

    epsilon: float
    pixels: bool = True

    def project(self, candidates: Tensor, center: Tensor) -> Tensor:
        """Nearest points of the set around ``center``: (N, C, H, W), (N, C, H, W) -> (N, C, H, W)."""
        inside = torch.clamp(candidates, center - self.epsilon, center + self.epsilon)
        return inside.clamp(0.0, 1.0) if self.pixels else inside

    def start(self, center: Tensor, uniform: Tensor) -> Tensor:
        """A uniform point of the ball, from draws in [0, 1) of the same shape, projected."""
        return self.project(center + self.epsilon * (2 * uniform - 1), center)

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient's sign."""
        return gradient.sign()


@dataclass(frozen=True)
class L2:
    """At most ``epsilon`` away in Euclidean distance over all pixels of an image, and in [0, 1]."""

    epsilon: float

    def project(self, candidates: Tensor, center: Tensor) -> Tensor:
        """Drawn back onto the ball, then cut with [0, 1], which only brings it nearer: -> (N, C, H, W)."""
        moved = candidates - center
        shrink = (self.epsilon / _norm(moved).clamp_min(1e-12)).clamp(max=1.0)
        return (center + shrink * moved).clamp(0.0, 1.0)

    def start(self, center: Tensor, uniform: Tensor) -> Tensor:
        """A random point of the ball's surface, cut with [0, 1]."""
        return self.project(center + self.epsilon * self.direction(2 * uniform - 1), center)

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient at length one."""
        return gradient / _norm(gradient).clamp_min(1e-12)


def _norm(images: Tensor) -> Tensor:
    return images.flatten(1).square().sum(dim=1).sqrt().view(-1, *[1] * (images.ndim - 1))
