"""The networks of APE-GAN and NRP: the published sizes, and layers as they are in the authors' frameworks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dircluster import rng
from dircluster.config import ConfigError, DataConfig
from dircluster.models import classifiers
from dircluster.models.apegan import Discriminator, Generator
from dircluster.models.nrp import RRDB, Critic, NRPNet, ResidualBlock


@pytest.mark.parametrize(
    ("make", "parameters", "mmac"),
    [
        (Generator, 419_971, 28.7),
        (Discriminator, 1_034_113, 27.4),
        (NRPNet, 3_600_643, 3684.0),
        (lambda: NRPNet(blocks=23), 16_550_275, None),
        (lambda: NRPNet(blocks=23, network="resg"), 1_702_211, 1740.0),
        (Critic, 899_465, 26.4),
    ],
)
def test_the_published_sizes(make: Any, parameters: int, mmac: float | None) -> None:
    with torch.device("meta"):
        network = make().eval()
        assert sum(p.numel() for p in network.parameters()) == parameters
        if mmac is not None:
            with FlopCounterMode(display=False) as counter:
                network(torch.zeros(1, 3, 32, 32))
            assert round(counter.get_total_flops() / 2e6, 1) == mmac


def fill(network: nn.Module) -> nn.Module:
    with rng.seeded_torch_rng(0, "fill"), torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3)
    return network.double().eval()


def test_convolutions_are_padded_as_tensorflow_does() -> None:
    """SAME at stride 2: output i reads inputs 2i - 1 to 2i + 3, zero where there are none; so its transpose."""
    network = fill(Generator(1, features=2))
    pad, layer = network.layers[0], network.layers[1]
    up, drop = network.layers[-3], network.layers[-2]
    image = torch.rand(1, 1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = layer(pad(image))
        back = drop(up(made))
    assert made.shape == (1, 2, 2, 3)
    assert back.shape == image.shape
    sums = torch.zeros_like(back)
    for row in range(2):
        for column in range(3):
            total = layer.bias.detach().clone()
            for i in range(5):
                for j in range(5):
                    y, x = 2 * row - 1 + i, 2 * column - 1 + j
                    if 0 <= y < 4 and 0 <= x < 6:
                        total += layer.weight.detach()[:, 0, i, j] * image[0, 0, y, x]
                        sums[0, 0, y, x] += (up.weight.detach()[:, 0, i, j] * made[0, :, row, column]).sum()
            torch.testing.assert_close(made[0, :, row, column], total)
    torch.testing.assert_close(back, sums + up.bias.detach())


def test_what_the_generator_gives_lies_in_the_unit_interval() -> None:
    """By its tanh: nothing is clamped, so that a gradient comes through everywhere."""
    made = fill(Generator(3, features=4))
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64).requires_grad_(True)
    restored = made(images)
    assert bool(((restored > 0) & (restored < 1)).all())
    (gradient,) = torch.autograd.grad(restored.sum(), images)
    assert bool((gradient != 0).all())


def test_blocks_add_a_fifth() -> None:
    block: Any = fill(RRDB(4, 2))
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)

    def dense(part: Any, given: Tensor) -> Tensor:
        found = given
        for layer in part.grow:
            new = layer(found)
            found = torch.cat([found, torch.where(new > 0, new, 0.2 * new)], dim=1)
        return given + part.last(found) / 5

    with torch.no_grad():
        inner = x
        for part in block.chain:
            inner = dense(part, inner)
        torch.testing.assert_close(block(x), x + inner / 5)
        light: Any = fill(ResidualBlock(4))
        torch.testing.assert_close(light(x), x + light.second(light.first(x).clamp_min(0)))


def test_activations_are_computed_again_where_asked() -> None:
    network = fill(NRPNet(1, features=4, growth=2, blocks=2))
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64).requires_grad_(True)
    (kept,) = torch.autograd.grad(network(images).sum(), images)
    network.recompute = True
    (again,) = torch.autograd.grad(network(images).sum(), images)
    assert torch.equal(kept, again)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 4), (9, 14)])
def test_the_critic_takes_any_image(height: int, width: int) -> None:
    assert Critic(1, height, width, features=2)(torch.rand(3, 1, height, width)).shape == (3,)


def data(side: int, channels: int) -> DataConfig:
    return DataConfig(height=side, width=side, channels=channels)


@pytest.mark.parametrize(
    ("architecture", "side", "half", "vector"),
    [
        ("resnet18", 32, (128, 16, 16), 512),
        ("preactresnet18", 32, (128, 16, 16), 512),
        ("small_cnn", 8, (64, 4, 4), 64),
    ],
)
def test_features_of_a_target(architecture: str, side: int, half: tuple[int, ...], vector: int) -> None:
    with torch.device("meta"):
        target = classifiers.build(architecture, data(side, 3)).eval()
        images = torch.zeros(2, 3, side, side)
        assert classifiers.half_map(target)(images).shape == (2, *half)
        assert classifiers.pooled(target)(images).shape == (2, vector)


def test_pooled_features_make_the_logits() -> None:
    target: Any = classifiers.build("small_cnn", data(8, 1)).eval()
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(target.network[-1](classifiers.pooled(target)(images)), target(images))


def test_a_network_that_does_not_say_is_refused() -> None:
    for find in (classifiers.half_map, classifiers.pooled):
        with pytest.raises(ConfigError, match=r"the target \(Bilinear\) does not say"):
            find(nn.Bilinear(1, 1, 1))
