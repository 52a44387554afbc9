"""The energy of an image and its Langevin dynamics (Hill, Mitchell and Zhu 2021), in units of [-1, 1]."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from dircluster.models.noise import counted_normal
from dircluster.models.precision import WholeConv2d

WIDTHS = (32, 64, 128, 256)
"""Channels of each stage, from full resolution down, in the published network."""
LEAK = 0.05
"""Slope of the published leaky rectifiers below zero."""


class Energy(nn.Sequential):
    """U: images (N, C, H, W) in [-1, 1] -> energies (N,).

    A 3x3 convolution, then a 4x4 one of stride 2 for every further stage, then one to a single value, leaky rectifiers
    between. The defaults are the published network, 693,569 parameters for 32x32 color images. Without ``smooth`` it is
    linear in pieces. All of it computes in fp32: a chain adds up hundreds of small steps.
    """

    def __init__(
        self, channels: int, height: int, width: int, widths: tuple[int, ...] = WIDTHS, *, smooth: bool = False
    ) -> None:
        def rectifier() -> nn.Module:
            return nn.SiLU() if smooth else nn.LeakyReLU(LEAK)

        layers: list[nn.Module] = [WholeConv2d(channels, widths[0], 3, 1, 1), rectifier()]
        for inputs, outputs in pairwise(widths):
            layers += [WholeConv2d(inputs, outputs, 4, 2, 1), rectifier()]
        halvings = 2 ** (len(widths) - 1)
        layers.append(WholeConv2d(widths[-1], 1, (height // halvings, width // halvings)))
        super().__init__(*layers)
        self.smooth = smooth

    def forward(self, images: Tensor) -> Tensor:
        for layer in self:
            images = layer(images)
        return images.flatten()


def langevin_step(energy: nn.Module, reached: Tensor, noise: Tensor, size: float) -> Tensor:
    """z - grad U(z) + size * noise, all (N, C, H, W): the step whose temperature is size^2 / 2.

    Gradients lead back through grad U too where somebody asks for them.
    """
    follows = torch.is_grad_enabled() and reached.requires_grad
    with torch.enable_grad():
        asked = reached if follows else reached.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(energy(asked).sum(), asked, create_graph=follows)
    return reached - slope + size * noise.to(reached.dtype)


def langevin(energy: nn.Module, start: Tensor, keys: Tensor, steps: int, size: float) -> Tensor:
    """``steps`` steps from ``start`` (N, C, H, W), by the noise of ``keys`` (N,): -> (N, C, H, W), detached.

    It needs gradients of its own, and leaves ``torch.inference_mode()`` for them.
    """
    with torch.inference_mode(False), torch.no_grad():
        reached = start.clone() if start.is_inference() else start.detach()
        for step in range(steps):
            reached = langevin_step(energy, reached, counted_normal(keys, step, tuple(start.shape[1:])), size)
    return reached
