"""The energy, its Langevin step and the noise of a chain, against plain readings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dircluster import rng
from dircluster.models.energy import LEAK, Energy, langevin, langevin_step
from dircluster.models.noise import counted_normal
from dircluster.training.costs import forward_operations


def small(smooth: bool = False) -> Energy:
    with rng.seeded_torch_rng(0, "energy"):
        return Energy(1, 4, 4, (2, 3), smooth=smooth).double().requires_grad_(False)


def images(count: int = 2, side: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return 2 * torch.rand(count, 1, side, side, generator=generator, dtype=torch.float64) - 1


def plain_convolution(image: list, weight: list, bias: list, stride: int, padding: int) -> list:
    """Of nested lists: channels, rows, columns."""
    side, kernel = len(image[0]), len(weight[0][0])
    out = (side + 2 * padding - kernel) // stride + 1

    def at(channel: int, row: int, column: int) -> float:
        inside = 0 <= row < side and 0 <= column < side
        return image[channel][row][column] if inside else 0.0

    return [
        [
            [
                bias[k]
                + sum(
                    weight[k][c][i][j] * at(c, stride * row + i - padding, stride * column + j - padding)
                    for c, i, j in itertools.product(range(len(image)), range(kernel), range(kernel))
                )
                for column in range(out)
            ]
            for row in range(out)
        ]
        for k in range(len(weight))
    ]


def plain_energy(network: Energy, image: Tensor) -> float:
    layers = [layer for layer in network if hasattr(layer, "weight")]
    values = image.tolist()
    for layer, (stride, padding) in zip(layers, ((1, 1), (2, 1), (1, 0)), strict=True):
        values = plain_convolution(values, layer.weight.tolist(), layer.bias.tolist(), stride, padding)
        if layer is not layers[-1]:
            values = [[[v if v > 0 else LEAK * v for v in row] for row in channel] for channel in values]
    return float(values[0][0][0])


def test_the_published_network() -> None:
    network = Energy(3, 32, 32)
    assert sum(p.numel() for p in network.parameters()) == 693_569
    operations = forward_operations(network.to("meta"), torch.zeros(1, 3, 32, 32, device="meta"))
    assert round(operations / 2e6, 2) == 26.05
    assert Energy(3, 32, 32)(torch.zeros(2, 3, 32, 32)).shape == (2,)


def test_a_langevin_step_is_that_of_the_paper() -> None:
    """z - grad U + size * noise, the gradient by differences of a plain reading of the energy."""
    network, start = small(), images()
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = langevin_step(network, start, noise, 0.01)
    for n, row, column in itertools.product(range(2), range(4), range(4)):
        moved = torch.zeros_like(start[n])
        moved[0, row, column] = 1e-6
        slope = (plain_energy(network, start[n] + moved) - plain_energy(network, start[n] - moved)) / 2e-6
        expected = start[n, 0, row, column] - slope + 0.01 * noise[n, 0, row, column]
        assert found[n, 0, row, column].item() == pytest.approx(expected.item(), abs=1e-8)
    assert not found.requires_grad


def test_a_chain_is_its_steps_by_the_noise_of_its_key() -> None:
    network, reached, keys = small(), images(), torch.tensor([3, 2**61])
    found = langevin(network, reached, keys, 3, 0.05)
    for step in range(3):
        reached = langevin_step(network, reached, counted_normal(keys, step, (1, 4, 4)), 0.05)
    assert torch.equal(found, reached)
    alone = torch.cat([langevin(network, images()[i : i + 1], keys[i : i + 1], 3, 0.05) for i in range(2)])
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("smooth", [False, True])
def test_the_exact_gradient_of_a_chain_is_the_identity_where_the_energy_is_linear_in_pieces(smooth: bool) -> None:
    network, asked = small(smooth), images().requires_grad_(True)
    noise = counted_normal(torch.tensor([1, 2]), 0, (1, 4, 4))
    reached = asked
    for _ in range(4):
        reached = langevin_step(network, reached, noise, 0.05)
    towards = torch.randn(reached.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (slope,) = torch.autograd.grad((reached * towards).sum(), asked)
    assert torch.allclose(slope, towards, rtol=0, atol=1e-12) == (not smooth)
    row, size = (0, 0, 1, 2), 1e-5  # and it is the chain's, by differences
    ends = []
    for sign in (1, -1):
        start = asked.detach().clone()
        start[row] += sign * size
        for _ in range(4):
            start = langevin_step(network, start, noise, 0.05)
        ends.append((start * towards).sum().item())
    assert slope[row].item() == pytest.approx((ends[0] - ends[1]) / (2 * size), rel=1e-5)


def test_noise_is_standard_normal_and_independent() -> None:
    keys = torch.randint(2**62, (40,), generator=torch.Generator().manual_seed(0))
    found = torch.stack([counted_normal(keys, step, (3, 11, 11)) for step in range(6)])  # steps, keys, C, H, W
    values = found.flatten()
    n = len(values)
    assert abs(values.mean().item()) < 4 / math.sqrt(n)
    assert values.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert (values**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    assert (values.abs() > 3).double().mean().item() == pytest.approx(0.0027, abs=4 * math.sqrt(0.0027 / n))
    for other in (found.roll(1, 0), found.roll(1, 1), found.roll(1, 4)):  # steps, keys, places
        assert abs((found * other).mean().item()) < 5 / math.sqrt(n)
        assert abs((found.abs() * other.abs()).mean().item() - 2 / math.pi) < 5 / math.sqrt(n)
    assert len(values.unique()) > 0.99 * n


def test_noise_follows_from_key_and_step_alone() -> None:
    keys = torch.tensor([5, 6, 5 + 2**32])
    found = counted_normal(keys, 7, (2, 3))
    assert torch.equal(found[1:2], counted_normal(keys[1:2], 7, (2, 3)))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found, counted_normal(keys, 8, (2, 3)))
    assert counted_normal(keys, 0, (1, 3, 3)).shape == (3, 1, 3, 3)
