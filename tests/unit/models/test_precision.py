"""What runs in bf16 and what in true fp32: images are never rounded, and fp32 stays what it was."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dircluster import rng
from dircluster.config import DataConfig
from dircluster.models import classifiers
from dircluster.models.masked_vit import MaskedDenoiser
from dircluster.models.modules import frozen
from dircluster.models.precision import (
    OutsideAutocast,
    WholeConv2d,
    WholeLinear,
    autocast,
    channels_last,
    half_weights,
    is_half,
    keep_whole,
    reads_images_whole,
)
from dircluster.models.transformer import Attention
from dircluster.models.unet import DUNet
from dircluster.presets.dir import ModelConfig

CPU = torch.device("cpu")
COLOR = DataConfig(name="cifar10", height=32, width=32, channels=3)
TINY = {"width": 12, "heads": 3, "encoder_depth": 1, "decoder_depth": 1}


class Standardized(nn.Conv2d):
    """A convolution of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True), self.bias)


def somebodys(classes: int, channels: int) -> nn.Module:
    """A factory's, whose layers are registered in another order than they are passed."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, classes), nn.Conv2d(4, 4, 3), Standardized(channels, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.middle(self.first(x)).mean(dim=(2, 3)))
            return logits

    return Network()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(classifiers.build, name, COLOR) for name in ("small_cnn", "resnet18", "preactresnet18")},
    "timm": lambda: classifiers.build("timm:vit_tiny_patch16_224", COLOR),
    "own": lambda: classifiers.build(f"{__name__}:somebodys", COLOR),
    "g": lambda: MaskedDenoiser(ModelConfig(**TINY), 3, 32, 32),  # type: ignore[arg-type]
    "g, mixing": lambda: MaskedDenoiser(ModelConfig(head="conv", **TINY), 3, 32, 32),  # type: ignore[arg-type]
    "u-net": lambda: DUNet(3, widths=(4, 4), units=(1, 1)),
}


def test_auto_is_bf16_on_a_gpu_alone() -> None:
    gpu = torch.device("cuda")
    assert [is_half("auto", device) for device in (CPU, gpu)] == [False, True]
    assert [is_half("bf16", CPU), is_half("fp32", gpu)] == [True, False]
    with autocast("bf16", CPU):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("auto", CPU):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_channels_lie_innermost_where_that_is_faster() -> None:
    gpu = torch.device("cuda")
    assert [channels_last("auto", device) for device in (CPU, gpu)] == [False, True]
    assert [channels_last("bf16", CPU), channels_last("fp32", gpu)] == [True, True]


def test_attention_in_bf16_on_a_cpu_is_that_of_fp32_rounded_once() -> None:
    """Its own backward pass in bf16 takes many times as long there."""
    torch.manual_seed(0)
    attention, x = Attention(24, 3), torch.randn(2, 9, 24, requires_grad=True)
    seen: list[torch.dtype] = []

    class Dtypes(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.extend(each.dtype for each in args)
            return func(*args, **(kwargs or {}))

    with Dtypes(), autocast("bf16", CPU):
        half = attention(x)
    assert half.dtype == torch.bfloat16
    assert seen == [torch.float32] * 3
    (gradient,) = torch.autograd.grad(half.float().square().sum(), x)
    whole = attention(x)
    (wanted,) = torch.autograd.grad(whole.square().sum(), x)
    torch.testing.assert_close(half.float(), whole, atol=0.02, rtol=0.02)
    torch.testing.assert_close(gradient, wanted, atol=0.05, rtol=0.05)
    own = attention.bfloat16()(x.detach().bfloat16())  # without autocast, a module that is bf16 itself
    assert own.dtype == torch.bfloat16


STATES = {
    "PyTorch's own": "",
    "older switches, TF32": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
    "newer switches": "torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}


@pytest.mark.long
@pytest.mark.parametrize("state", STATES)
def test_predictions_are_made_without_tf32_whoever_switched_it_and_the_switches_come_back(state: str) -> None:
    """In a process of its own: the older and the newer switches are parted for good once both were used."""
    script = f"""
import torch
from dircluster.models.precision import autocast, exact

def read(what):
    try:
        return what()
    except RuntimeError:
        return "parted"

def switches():
    newer = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    older = (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    )
    return [place.fp32_precision for place in newer], [read(one) for one in older]

{STATES[state]}
cpu = torch.device("cpu")
before = switches()
with autocast("bf16", cpu), exact(cpu):
    newer, older = switches()
    assert newer == ["ieee"] * 3, newer
    assert "parted" not in older or "parted" in before[1], (before, older)
    assert True not in older, older
    assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert torch.nn.functional.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).dtype == torch.float32
assert switches() == before, (switches(), before)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_and_the_last_layer_compute_in_fp32(name: str) -> None:
    """In bf16 an image of 0.7 would be 0.6992, a third of a gray level away."""
    network, seen = NETWORKS[name]().eval(), []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((isinstance(module, OutsideAutocast), output.dtype))

    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            module.register_forward_hook(note)
    size = 224 if name == "timm" else 32
    inputs = [torch.rand(2, 3, size, size)]
    if name.startswith("g"):
        inputs.append(torch.stack([torch.arange(128), torch.arange(128, 256)])[:, None].expand(2, 2, -1))
    with autocast("bf16", CPU), torch.no_grad():
        network(*inputs)
    whole = [kind for kind, _ in seen]
    assert whole[0]
    assert whole[-1]
    assert sum(whole) == 2
    assert {dtype for kind, dtype in seen if kind} == {torch.float32}
    assert {dtype for kind, dtype in seen if not kind} == {torch.bfloat16}
    assert reads_images_whole(network)


def test_outside_autocast_such_a_layer_is_the_layer_it_was() -> None:
    for made, plain in ((WholeLinear(4, 3), nn.Linear(4, 3)), (WholeConv2d(2, 3, 3), nn.Conv2d(2, 3, 3))):
        plain.load_state_dict(made.state_dict())
        x = torch.rand(2, 4) if isinstance(plain, nn.Linear) else torch.rand(2, 2, 5, 5)
        assert torch.equal(made(x), plain(x))
        assert made(x.bfloat16()).dtype == torch.float32  # what sharded blocks in bf16 give
        assert made.double()(x.double()).dtype == torch.float64
        assert made.to("meta")(x.double().to("meta")).device.type == "meta"
        assert repr(made) == repr(plain)  # fingerprints of models hold it


def test_somebodys_network_is_known_to_round_images() -> None:
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert not reads_images_whole(classifiers.build("small_cnn", COLOR), own)
    keep_whole(own[0])
    assert reads_images_whole(own)
    assert not reads_images_whole(nn.Identity())  # of layers without weights nobody knows
    assert timm.is_model("resnet18")
    assert type(classifiers.build("timm:resnet18", COLOR).network.conv1) is WholeConv2d  # type: ignore[union-attr]


def test_a_layer_of_somebodys_own_stays_what_it_is_but_for_its_precision() -> None:
    plain = somebodys(10, 3)
    made = copy.deepcopy(classifiers.build(f"{__name__}:somebodys", COLOR))
    plain.load_state_dict(made.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(made(images), plain(images))
    assert repr(made) == repr(plain)
    assert isinstance(made.first, Standardized)
    assert type(made.first).__module__ == __name__  # by which stored results know its code
    keep_whole(made.first)  # again
    assert repr(made) == repr(plain)


def unfit(classes: int, channels: int) -> nn.Module:
    """For images of 8 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1) + torch.randn(len(x), 1))


def noisy(classes: int, channels: int) -> nn.Module:
    """Draws at each pass."""
    return Noisy(3072, classes)


def test_a_network_that_cannot_be_passed_is_left_as_it_is() -> None:
    assert not reads_images_whole(classifiers.build(f"{__name__}:unfit", COLOR))


def test_looking_for_the_ends_of_a_network_draws_nothing() -> None:
    found = []
    for make in (lambda: noisy(10, 3), lambda: classifiers.build(f"{__name__}:noisy", COLOR)):
        with rng.seeded_torch_rng(0, "noisy"):
            found.append([make().weight, torch.rand(2)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Casts(TorchDispatchMode):
    """Notes what is cast to bf16, by its place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def __torch_dispatch__(self, what: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if what is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.places.append(args[0].data_ptr())
        return what(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["small_cnn", "preactresnet18", "timm", "g", "u-net"])
def test_twins_of_still_weights_give_the_same_bits_from_one_cast_each(name: str) -> None:
    network = NETWORKS[name]().eval()
    size = 224 if name == "timm" else 32
    others = [torch.stack([torch.arange(128), torch.arange(128, 256)])[:, None]] if name == "g" else []
    weights = [layer.weight.data_ptr() for layer in network.modules() if type(layer) in (nn.Linear, nn.Conv2d)]

    def gradient(images: Tensor) -> Tensor:
        asked = images.requires_grad_(True)
        return torch.autograd.grad(network(asked, *others).float().square().sum(), asked)[0]

    found, casts = [], []
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with frozen(network):
        for still in ((), (network,)):
            with Casts() as seen, autocast("bf16", CPU, *still):
                found.append([gradient(images.clone()) for _ in range(2)][-1])
            casts.append(sum(place in weights for place in seen.places))
    assert torch.equal(*found)
    assert casts == [2 * len(weights), len(weights)]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in network.parameters())


def test_weights_come_back_whatever_happens_and_images_stay_whole() -> None:
    network = classifiers.build("small_cnn", COLOR)
    own = list(network.parameters())
    with contextlib.suppress(ZeroDivisionError), half_weights(network):
        kept = {type(part) for part in network.modules() if getattr(part, "weight", own[0]).dtype == torch.bfloat16}
        raise ZeroDivisionError
    assert kept == {nn.Conv2d, nn.Linear}
    assert all(one is other for one, other in zip(network.parameters(), own, strict=True))
    with autocast("auto", CPU, network):
        assert all(one is other for one, other in zip(network.parameters(), own, strict=True))
