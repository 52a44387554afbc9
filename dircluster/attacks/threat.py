"""The threat model: a ball around each image, cut with the pixel range unless what is attacked is not an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dircluster.config import AttackConfig


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

    def ahead(self, momentum: Tensor) -> Tensor:
        """How far a momentum of gradients, each divided by its mean absolute value, carries: about a unit step each."""

    def unclipped(self, scale: float = 1.0) -> Threat:
        """The ball of ``scale`` times the radius, not cut with the pixel range: for what need not be an image."""


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

    def ahead(self, momentum: Tensor) -> Tensor:
        """The momentum: pixels of such a gradient move by one on average, as by its sign."""
        return momentum

    def unclipped(self, scale: float = 1.0) -> LInf:
        """The ball of ``scale`` times the radius, not cut with the pixel range."""
        return LInf(scale * self.epsilon, pixels=False)


@dataclass(frozen=True)
class L2:
    """At most ``epsilon`` away in Euclidean distance over an image, and in [0, 1] where ``pixels`` holds."""

    epsilon: float
    pixels: bool = True

    def project(self, candidates: Tensor, center: Tensor) -> Tensor:
        """Points of the set around ``center``: (N, C, H, W), (N, C, H, W) -> (N, C, H, W).

        They are drawn back onto the ball and then cut with [0, 1], which only brings them nearer to an image.
        """
        moved = candidates - center
        shrink = (self.epsilon / _norm(moved).clamp_min(1e-12)).clamp(max=1.0)
        inside = center + shrink * moved
        return inside.clamp(0.0, 1.0) if self.pixels else inside

    def start(self, center: Tensor, uniform: Tensor) -> Tensor:
        """A random point of the ball's surface, from draws in [0, 1) of the same shape, cut as the set is."""
        return self.project(center + self.epsilon * self.direction(2 * uniform - 1), center)

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient at length one, also where it is so small that its square is zero."""
        peak = gradient.abs().flatten(1).amax(dim=1).view(-1, *[1] * (gradient.ndim - 1))
        found = gradient / torch.where((peak > 0) & (peak < 1e-12), peak, 1.0)
        return found / _norm(found).clamp_min(1e-12)

    def ahead(self, momentum: Tensor) -> Tensor:
        """The momentum over the root of the number of pixels, which is about the length of such a gradient."""
        return momentum / math.sqrt(momentum[0].numel())

    def unclipped(self, scale: float = 1.0) -> L2:
        """The ball of ``scale`` times the radius, not cut with the pixel range."""
        return L2(scale * self.epsilon, pixels=False)


BALLS: dict[str, type[LInf] | type[L2]] = {"linf": LInf, "l2": L2}
"""Threats by the norm that bounds them."""


def threat_of(attack: AttackConfig) -> LInf | L2:
    """What ``attack`` allows: the ball of its norm and radius around an image, cut with the pixel range."""
    return BALLS[attack.norm](attack.epsilon)


def _norm(images: Tensor) -> Tensor:
    return images.flatten(1).square().sum(dim=1).sqrt().view(-1, *[1] * (images.ndim - 1))
