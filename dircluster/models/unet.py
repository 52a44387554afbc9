"""DUNET, the denoising U-net of HGD (Liao et al. 2018): it restores an image by what it adds to it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.models.precision import WholeConv2d, keep_whole

WIDTHS = (64, 128, 256, 256, 256)
"""Channels of each encoder stage, from full resolution down, in the published network."""
UNITS = (2, 3, 3, 3, 3)
"""Convolution units of each encoder stage in the published network."""


class Unit(nn.Sequential):
    """A 3x3 convolution, batch normalization and ReLU: (N, inputs, H, W) -> (N, outputs, ceil(H/s), ceil(W/s))."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, *, bias: bool = False, momentum: float = 0.1
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias),
            nn.BatchNorm2d(outputs, momentum=momentum),
            nn.ReLU(),
        )


class DUNet(nn.Module):
    """g of HGD (Liao et al. 2018): x + U(x), with U a U-net of convolution units.

    Stage i of the encoder has ``units[i]`` units of ``widths[i]`` channels, and every stage but the first halves the
    sides, rounding up. The decoder goes the same way back: it brings its features bilinearly to the size of the next
    larger encoder stage, concatenates that stage's output, and applies as many units of as many channels as that stage
    has. A 1x1 convolution without bias gives what is added to the image. The defaults are the published network, which
    has 11,033,984 parameters for color images. Nothing is initialized to zero, so an untrained network is far from the
    identity.

    ``variant`` "hgd" is the authors' network. "cafd" is the port of a later repository of the DIR paper's first author
    (dwDavidxd/CAFD): convolutions have biases, running statistics have momentum 0.9, and the first unit of a decoder
    stage of three or more units has stride 2, which looks like an accident; it has 11,038,851 parameters.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        widths: tuple[int, ...] = WIDTHS,
        units: tuple[int, ...] = UNITS,
        variant: Literal["hgd", "cafd"] = "hgd",
    ) -> None:
        super().__init__()
        self.channels, stages = channels, len(widths)
        ported = variant == "cafd"

        def stage(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
            momentum = 0.9 if ported else 0.1
            first = Unit(inputs, outputs, stride, bias=ported, momentum=momentum)
            return nn.Sequential(
                first, *(Unit(outputs, outputs, bias=ported, momentum=momentum) for _ in range(count - 1))
            )

        inputs = (channels, *widths)
        self.encoder = nn.ModuleList(
            stage(inputs[i], widths[i], units[i], stride=1 if i == 0 else 2) for i in range(stages)
        )
        self.decoder = nn.ModuleList(
            stage(widths[i + 1] + widths[i], widths[i], units[i], stride=2 if ported and units[i] >= 3 else 1)
            for i in reversed(range(stages - 1))
        )
        self.head = WholeConv2d(widths[0], channels, 1, bias=ported)
        keep_whole(self.encoder[0][0][0])  # type: ignore[index]

    def forward(self, images: Tensor) -> Tensor:
        """Restored images, not clamped: (N, C, H, W) in [0, 1] -> (N, C, H, W), any H and W."""
        if images.shape[1] != self.channels:  # the sum at the end would broadcast gray images to color
            raise ValueError(f"expected {self.channels} channels, got {images.shape[1]}")
        features, skips = images, []
        for stage in self.encoder:
            features = stage(features)
            skips.append(features)
        for stage, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            enlarged = F.interpolate(features, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            features = stage(torch.cat([enlarged, skip], dim=1))
        restored: Tensor = images + self.head(features)
        return restored
