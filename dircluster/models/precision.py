"""In which precision things are computed.

What finds samples runs in bf16 by autocast where ``training.precision`` and ``evaluation.precision`` ask for it, or by
itself on a GPU: crafting, updates of weights, held-out selection. What is claimed runs in true fp32: the final
predictions of an evaluation, :func:`exact`. Layers that read an image, write one, or give logits stay outside autocast:
in bf16 the image itself would be rounded, by steps of 1/255 from 0.5 up and of 2/255 from 1 up, the size of an attack's
step. They cost less than a hundredth of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dircluster.models.modules import evaluating
from dircluster.rng import put_back

Precision = Literal["auto", "fp32", "bf16"]


def is_half(precision: Precision, device: torch.device) -> bool:
    """Whether ``precision`` is bf16 on ``device``: auto is, on a GPU."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def channels_last(precision: Precision, device: torch.device) -> bool:
    """Whether convolutions are faster with their channels innermost: on a GPU, and in bf16 on a CPU."""
    return device.type == "cuda" or is_half(precision, device)


@contextmanager
def autocast(precision: Precision, device: torch.device, *still: nn.Module) -> Iterator[None]:
    """Products and convolutions in bf16 where :func:`is_half` holds.

    The weights of ``still``, which nothing changes and nobody differentiates by inside, are cast once instead of at
    each use: the same numbers from far fewer kernels, for an attack uses them at each of its steps.
    """
    half = is_half(precision, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=half), half_weights(*still if half else ()):
        yield


@contextmanager
def many_shapes() -> Iterator[None]:
    """Inside, no kernels are tried out on a GPU: that pays for the few shapes of a training, and at each step of an
    attack which images leave there is another.
    """
    library: Any = torch.backends.cudnn
    found = library.benchmark
    library.benchmark = False
    try:
        yield
    finally:
        library.benchmark = found


@contextmanager
def half_weights(*networks: nn.Module) -> Iterator[None]:
    """Inside, layers of ``networks`` that autocast would cast hold bf16 twins of their weights; their own afterwards.

    Sharded weights stay: whoever gathers them casts them.
    """
    layers = {part for network in networks for part in network.modules() if type(part) in WHOLE}
    own = [(layer, dict(layer._parameters)) for layer in layers if type(layer.weight) is nn.Parameter]
    try:
        for layer, found in own:
            for name, parameter in found.items():
                if parameter is not None:
                    layer._parameters[name] = nn.Parameter(parameter.detach().bfloat16(), requires_grad=False)
        yield
    finally:
        for layer, found in own:
            layer._parameters.update(found)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """True fp32 inside: no autocast, and no TF32 in products, convolutions and recurrent layers."""
    library: Any = torch.backends.cudnn
    other: Any = torch.backends.mkldnn
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, library.conv, library.rnn, other.matmul)
    found = [place.fp32_precision for place in places]
    products, convolutions = (
        _older_switch(torch.get_float32_matmul_precision),
        _older_switch(lambda: library.allow_tf32),
    )

    def switch(products: str | None, convolutions: bool | None, precisions: list[str]) -> None:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            library.allow_tf32 = convolutions
        for place, precision in zip(places, precisions, strict=True):
            place.fp32_precision = precision

    try:
        switch(products and "highest", convolutions and False, ["ieee"] * len(places))
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        switch(products, convolutions, found)


def _older_switch(read: Callable[[], Any]) -> Any:
    """PyTorch's older switch of TF32, which must agree with the newer ones; None where somebody has parted them."""
    try:
        return read()
    except RuntimeError:
        return None


def outside_autocast(device: torch.device) -> Any:
    """Inside, what autocast surrounds is computed in the precision of its inputs; for devices without one too."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class OutsideAutocast(nn.Module):
    """A layer that computes in the precision of its weights, fp32, whatever surrounds it."""

    reads_whole = True
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        kind, whole = x.device.type, x.to(self.weight.dtype)
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return super().forward(whole)  # type: ignore[no-any-return]
        with torch.autocast(kind, enabled=False):
            return super().forward(whole)  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        return type(self).__bases__[-1].__name__  # what it computes is what it is called


class WholeLinear(OutsideAutocast, nn.Linear):
    """``nn.Linear`` in fp32."""


class WholeConv1d(OutsideAutocast, nn.Conv1d):
    """``nn.Conv1d`` in fp32."""


class WholeConv2d(OutsideAutocast, nn.Conv2d):
    """``nn.Conv2d`` in fp32."""


class WholeConvTranspose2d(OutsideAutocast, nn.ConvTranspose2d):  # type: ignore[misc]  # of output sizes, unused
    """``nn.ConvTranspose2d`` in fp32."""


WHOLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: WholeLinear,
    nn.Conv1d: WholeConv1d,
    nn.Conv2d: WholeConv2d,
    nn.ConvTranspose2d: WholeConvTranspose2d,
}


@cache
def _whole(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind``, a convolution or linear layer in a form of somebody's own, in fp32."""
    return type(kind.__name__, (OutsideAutocast, kind), {"__module__": kind.__module__})


def keep_whole(layer: nn.Module) -> None:
    """Make ``layer`` of somebody's network one that computes in fp32, where it is a convolution or linear."""
    kind = type(layer)
    if isinstance(layer, tuple(WHOLE)) and not isinstance(layer, OutsideAutocast):
        layer.__class__ = WHOLE.get(kind) or _whole(kind)  # type: ignore[arg-type]  # classes are hashable


def keep_ends_whole(network: nn.Module, images: Tensor) -> None:
    """Keep the first and the last layer whole that ``images`` (N, C, H, W) pass in somebody's network, if they do."""
    layers = [part for part in network.modules() if isinstance(part, tuple(WHOLE))]
    passed: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: passed.append(layer)) for layer in layers]
    try:
        with put_back(), evaluating(network), torch.no_grad():
            network(images)
    except Exception:  # whoever uses the network sees it
        passed.clear()
    finally:
        for hook in hooks:
            hook.remove()
    for layer in (*passed[:1], *passed[-1:]):
        keep_whole(layer)


def reads_images_whole(*networks: nn.Module) -> bool:
    """Whether each of ``networks`` has a part that ``reads_whole``, so that bf16 does not round the images it is given.

    Layers outside autocast do, and purifiers that say so. What somebody made elsewhere does not: attacks on it in bf16
    would be weaker than they look.
    """
    return all(any(getattr(part, "reads_whole", False) for part in network.modules()) for network in networks)
