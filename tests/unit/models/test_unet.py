"""HGD's DUNET: the published sizes, any image, and what a purifier must be for an attack to pass through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dircluster import rng
from dircluster.models.unet import DUNet

SMALL: dict[str, Any] = {"channels": 1, "widths": (8, 16, 16), "units": (2, 3, 3)}


def small(**changes: Any) -> DUNet:
    """The network for 8x8 digits, its running statistics not those of a fresh one."""
    with rng.seeded_torch_rng(0, "unet"):
        network = DUNet(**{**SMALL, **changes})
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2.0)
    return network


def images(n: int = 4, channels: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize(("variant", "parameters", "gmac"), [("hgd", 11_033_984, 0.792), ("cafd", 11_038_851, 0.509)])
def test_the_published_sizes(variant: Any, parameters: int, gmac: float) -> None:
    with torch.device("meta"):
        network = DUNet(variant=variant).eval()
        assert sum(p.numel() for p in network.parameters()) == parameters
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 2e9, 3) == gmac  # a multiply-add counts as two operations


def test_the_stages_of_the_published_network() -> None:
    sizes = []
    with torch.device("meta"):
        network = DUNet().eval()
        for stage in [*network.encoder, *network.decoder]:
            stage.register_forward_hook(lambda _, given, made: sizes.append((given[0].shape[1], *made.shape[1:])))
        network(torch.zeros(1, 3, 32, 32))
    down = [(3, 64, 32, 32), (64, 128, 16, 16), (128, 256, 8, 8), (256, 256, 4, 4), (256, 256, 2, 2)]
    assert sizes == [*down, (512, 256, 4, 4), (512, 256, 8, 8), (384, 128, 16, 16), (192, 64, 32, 32)]


@pytest.mark.parametrize("variant", ["hgd", "cafd"])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 8, 8), (3, 9, 7), (1, 5, 4)])
def test_images_of_any_size_come_back_at_their_size(variant: Any, channels: int, height: int, width: int) -> None:
    network = small(channels=channels, variant=variant)
    given = images(2, channels, height, width)
    assert network(given).shape == given.shape
    assert network.eval()(given[:1]).shape == (1, channels, height, width)


def test_gray_images_are_not_broadcast_to_color() -> None:
    with pytest.raises(ValueError, match="expected 3 channels, got 1"):
        small(channels=3)(images())


def test_what_is_added_to_the_image_is_not_clamped() -> None:
    network = small().eval()
    nn.init.zeros_(network.head.weight)
    assert torch.equal(network(images()), images())
    nn.init.constant_(network.head.weight, 10.0)
    restored = network(images())
    assert restored.max() > 1


def test_an_untrained_network_is_not_the_identity() -> None:
    assert (small().eval()(images()) - images()).abs().mean() > 0.01


def test_gradients_reach_the_images() -> None:
    network = small().eval().double()
    asked = images(2).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network(asked).square().sum(), asked)
    assert (gradient != 0).all()
    moved = torch.zeros_like(asked)
    moved[0, 0, 3, 4] = 1e-6
    with torch.no_grad():
        rise = network(asked + moved).square().sum() - network(asked - moved).square().sum()
    assert (rise / 2e-6).item() == pytest.approx(gradient[0, 0, 3, 4].item(), rel=1e-5)


def test_in_eval_mode_an_image_does_not_depend_on_its_batch() -> None:
    network = small().eval().double()
    together = network(images(4).double())
    alone = torch.cat([network(image[None]) for image in images(4).double()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert not torch.allclose(network.train()(images(4).double()), together)  # batch statistics would show
