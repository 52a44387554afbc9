"""Helpers for any module: its device, its mode, its passes, and its parameters frozen while it is attacked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint


def begin(draw: Callable[..., Any], weight: Tensor, **how: Any) -> None:
    """Draw the first values of ``weight``, but on the meta device: there PyTorch would import its compiler for it."""
    if not weight.is_meta:
        draw(weight, **how)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No parameter of ``modules`` asks for a gradient inside; what asked for one before does so again after."""
    asked = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def to_eval(module: nn.Module) -> None:
    """Bring ``module`` into eval mode, in place: what somebody's ``train`` returns may be nothing."""
    try:
        module.eval()
    except NotImplementedError:  # the mode of what torch.export made is part of its graph
        for part in module.modules():
            part.training = False


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """``modules`` are in eval mode inside; every part of them is in its own mode again after."""
    parts = [part for module in modules for part in module.modules()]
    modes = [(part, part.training) for part in parts if hasattr(part, "training")]  # frozen scripts have no mode
    for module in modules:
        to_eval(module)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def under_attack(*modules: nn.Module) -> Iterator[None]:
    """While samples are crafted: modules in eval mode, their parameters frozen; as they were afterwards."""
    with evaluating(*modules), frozen(*modules):
        yield


def passed(blocks: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """``x`` after one block after the other; with ``recompute`` their activations are computed again, not kept."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
    return x


def device_of(module: nn.Module) -> torch.device:
    """The device of the module's first parameter or buffer; the CPU where it has none."""
    return next((tensor.device for tensor in parts_of(module)), torch.device("cpu"))


def parts_of(module: nn.Module) -> list[Tensor]:
    """The module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def to_bytes(tensor: Tensor) -> bytes:
    """The numbers of ``tensor``, row by row, in its own dtype, which may be one that NumPy does not know."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def defaults_kept() -> Iterator[None]:
    """The dtype and device of new tensors, and whether gradients are kept, are afterwards as they were before."""
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


@contextmanager
def plain_torch() -> Iterator[None]:
    """New tensors are float32 and lie on the CPU inside, whatever the process has for its defaults."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def unfinished(module: nn.Module) -> str:
    """Why somebody's module cannot be computed with, or its weights not kept; "" where nothing stands in the way."""
    parts = parts_of(module)
    if any(is_lazy(part) for part in parts):
        return "has weights without a size (lazy layers): pass images through it once"
    if any(part.is_meta for part in parts) and torch.get_default_device().type != "meta":
        return "lies on the meta device, where nothing is computed: load its weights first"
    return ""


class TooLargeError(Exception):
    """Modules would hold more numbers than they may."""


@contextmanager
def at_most(numbers: int, tensors: int | None = None) -> Iterator[None]:
    """Raise TooLargeError as soon as modules that are made inside hold more than so many numbers, or ``tensors``.

    What other threads make meanwhile, whose modules meet PyTorch's hooks as well, is theirs.
    """
    found, held, mine = 0, 0, threading.get_ident()

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal found, held
        if threading.get_ident() != mine:
            return
        found, held = found + (0 if tensor is None else tensor.numel()), held + 1
        if found > numbers or (tensors is not None and held > tensors):
            raise TooLargeError

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
