"""The threat model: an L-infinity ball, cut with the pixel range unless what is attacked is not an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
