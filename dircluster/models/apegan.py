"""The networks of APE-GAN (Jin et al. 2019): an autoencoder that takes attacks out of images, and its critic."""

from __future__ import annotations

from torch import Tensor, nn

from dircluster.models.modules import begin
from dircluster.models.precision import keep_whole


class DropLast(nn.Module):
    """(N, C, H, W) -> (N, C, H - 1, W - 1): what makes a transposed convolution that of TensorFlow's SAME."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :-1, :-1]


def _halving(inputs: int, outputs: int) -> list[nn.Module]:
    """5x5 convolution of stride 2 with TensorFlow's SAME padding: a row before, two after, where sides are even."""
    return [nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(inputs, outputs, 5, stride=2)]


def _doubling(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=1), DropLast()]


def _initialize(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            begin(nn.init.normal_, layer.weight, std=0.02)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)


class Generator(nn.Module):
    """G: two halvings, two doublings, no way around them; what it gives lies in (0, 1) by its tanh.

    419,971 parameters for color images. Sides must be multiples of 4.
    """

    def __init__(self, channels: int = 3, features: int = 64) -> None:
        super().__init__()
        few, many = features, 2 * features
        self.layers = nn.Sequential(
            *_halving(channels, few),
            nn.BatchNorm2d(few),
            nn.LeakyReLU(0.2),
            *_halving(few, many),
            nn.BatchNorm2d(many),
            nn.LeakyReLU(0.2),
            *_doubling(many, few),
            nn.BatchNorm2d(few),
            nn.ReLU(),
            *_doubling(few, channels),
            nn.Tanh(),
        )
        _initialize(self)
        keep_whole(self.layers[1])
        keep_whole(self.layers[-3])

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, C, H, W) in (0, 1); inside, pixels lie in [-1, 1]."""
        restored: Tensor = self.layers(2 * images - 1)
        return (restored + 1) / 2


class Discriminator(nn.Module):
    """D: natural or restored? 1,034,113 parameters for color images of 32x32. Sides must be multiples of 8."""

    def __init__(self, channels: int = 3, height: int = 32, width: int = 32, features: int = 64) -> None:
        super().__init__()
        few, more, most = features, 2 * features, 4 * features
        self.layers = nn.Sequential(
            *_halving(channels, few),
            nn.LeakyReLU(0.2),
            *_halving(few, more),
            nn.BatchNorm2d(more),
            nn.LeakyReLU(0.2),
            *_halving(more, most),
            nn.BatchNorm2d(most),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(most * (height // 8) * (width // 8), 1),
        )
        _initialize(self)
        keep_whole(self.layers[1])
        keep_whole(self.layers[-1])

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N,) logits, high for natural ones."""
        logits: Tensor = self.layers(2 * images - 1)
        return logits[:, 0]
