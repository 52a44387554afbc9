"""The networks of NRP (Naseer et al. 2020): a purifier without a way around it, and its relativistic critic."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.models.modules import begin, passed
from dircluster.models.precision import keep_whole


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class DenseBlock(nn.Module):
    """Five convolutions, each on all that came before it: input + 0.2 times the last. (N, features, H, W) -> same."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.grow = nn.ModuleList(_conv(features + i * growth, growth) for i in range(4))
        self.last = _conv(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.grow:
            found.append(F.leaky_relu(layer(torch.cat(found, dim=1)), 0.2))
        out: Tensor = self.last(torch.cat(found, dim=1))
        return x + 0.2 * out


class RRDB(nn.Module):
    """A residual block in residual dense blocks (ESRGAN): input + 0.2 times what three dense blocks make of it."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(DenseBlock(features, growth) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.chain(x)
        return x + 0.2 * out


class ResidualBlock(nn.Module):
    """Input + two convolutions with a ReLU between; their weights start at a tenth of Kaiming's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first, self.second = _conv(features, features), _conv(features, features)
        for layer in (self.first, self.second):
            begin(nn.init.kaiming_normal_, layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                layer.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu(self.first(x)))
        return x + out


class NRPNet(nn.Module):
    """g of NRP: a convolution, ``blocks`` blocks, a convolution that makes an image: no skip, no statistics.

    ``network`` "rrdb" is the paper's: 16,550,275 parameters with the 23 blocks of the public model, 3,600,643 with 5,
    for color images. "resg" is its light one, 1,702,211 with 23 blocks.
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        features: int = 64,
        growth: int = 32,
        blocks: int = 5,
        network: Literal["rrdb", "resg"] = "rrdb",
    ) -> None:
        super().__init__()
        dense = network == "rrdb"
        self.slope = 1.0 if dense else 0.1
        self.first, self.head = _conv(channels, features), _conv(features, channels)
        self.blocks = nn.ModuleList(RRDB(features, growth) if dense else ResidualBlock(features) for _ in range(blocks))
        self.recompute = False
        """Whether activations of blocks are computed again in the backward pass instead of being kept."""
        keep_whole(self.first)
        keep_whole(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, C, H, W), not clamped."""
        found = F.leaky_relu(self.first(images), self.slope)
        restored: Tensor = self.head(passed(self.blocks, found, self.recompute))
        return restored


class Critic(nn.Module):
    """D of NRP in the form for small images: pairs of a 3x3 convolution and a halving, down to 2 or 3 pixels.

    Channels are ``features`` times 1, 2, 4, 4, ... 899,465 parameters for color images of 32x32.
    """

    def __init__(self, channels: int = 3, height: int = 32, width: int = 32, features: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs, sides = channels, [height, width]
        for pair in range(min(height, width).bit_length() - 2):
            outputs = features * min(2**pair, 4)
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=pair == 0))
            if pair > 0:
                layers.append(nn.BatchNorm2d(outputs))
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(outputs, outputs, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
            inputs, sides = outputs, [side // 2 for side in sides]
        layers += [nn.Flatten(), nn.Linear(inputs * sides[0] * sides[1], 100), nn.LeakyReLU(0.2), nn.Linear(100, 1)]
        self.layers = nn.Sequential(*layers)
        keep_whole(self.layers[0])
        keep_whole(self.layers[-1])

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N,), higher for what looks more natural."""
        scores: Tensor = self.layers(images)
        return scores[:, 0]
