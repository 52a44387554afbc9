"""Anybody's module, or function, as one of float32 images -> float32 logits, and its surroundings left as they were."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import ConfigError
from dircluster.defenses.base import Defended, drawing_from_torch
from dircluster.models.modules import parts_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""What images may be passed on as; the first that a module takes."""


class Adapted(nn.Module):
    """Images (N, C, H, W), float32 -> logits (N, classes), float32, whatever form ``inner`` gives them.

    The images that ``inner`` gets are its own, to change as it likes. The modules that a function refers to are parts
    of this one, so that they are judged in eval mode and with frozen parameters.
    """

    def __init__(
        self, inner: Callable[..., Any], called: str = "the defense", place: torch.device | None = None
    ) -> None:
        """``place`` is where ``inner`` makes tensors by default. Raises ConfigError where it is no function."""
        super().__init__()
        if isinstance(inner, torch.export.ExportedProgram):
            inner = inner.module()
        if isinstance(inner, type) or not callable(inner):
            what = f"the class {inner.__name__}" if isinstance(inner, type) else type(inner).__name__
            raise ConfigError(f"{called} must be a module or a function of images, got {what}")
        self.inner, self.called, self.place = inner, called, place
        self.parts = nn.ModuleList([] if isinstance(inner, nn.Module) else modules_in(inner))
        self.drawing = [part for part in self.modules() if isinstance(part, Defended) and not part.is_fixed]
        self.dtype, self.form = DTYPES[0], ""
        """What images are passed on as, and where the logits were found; empty where they are all there is."""

    def fit(self, images: Tensor) -> None:
        """Learn which dtype is taken, from a few images (N, C, H, W). Raises what the module does if none is."""
        failed: Exception | None = None
        for self.dtype in DTYPES:
            try:
                self(images)
            except ConfigError:
                raise
            except Exception as error:  # whatever somebody's module says of images that it was not made for
                failed = failed or error
            else:
                return
        self.dtype = DTYPES[0]
        assert failed is not None
        raise failed

    @property
    def notes(self) -> list[str]:
        """What was done to make it answer, a line each."""
        passed = f"{self.called} takes {str(self.dtype).removeprefix('torch.')}: images are passed on as that"
        form = f"{self.called} returns {self.form} for its logits"
        return [line for line, said in ((passed, self.dtype != DTYPES[0]), (form, bool(self.form))) if said]

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes). Raises ConfigError where no logits are in what comes back."""
        return self.answer(self.inner, images)

    def answer(self, part: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """What ``part`` of the module gives for images (N, C, H, W), (N, ...) in float32 on their device."""
        with nullcontext() if self.place is None else self.place, drawing_from_torch(self.drawing):
            found, self.form = unpacked(part(images.clone().to(self.dtype)))
        if not isinstance(found, Tensor) or found.ndim < 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"{self.called} must return logits (N, classes) for {len(images)} images, got {shape}")
        return found.to(images.device).float()


def unpacked(found: Any) -> tuple[Any, str]:
    """The logits in what a module returned, and a phrase that says where they were; itself and "" for a tensor."""
    kind = type(found).__name__
    if isinstance(found, Tensor):
        return found, ""
    if isinstance(getattr(found, "logits", None), Tensor):
        return found.logits, f"{kind}, whose .logits are taken"
    if isinstance(found, Mapping):
        parts: dict[Any, Any] = dict(found)
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    elif isinstance(found, tuple | list):
        parts = dict(enumerate(found[:1]))
    else:
        return found, ""
    tensors = [name for name, part in parts.items() if isinstance(part, Tensor)]
    name = "logits" if "logits" in tensors else tensors[0] if len(tensors) == 1 else None
    if name is None:
        return found, ""
    where = "first element is" if name == 0 else f"{name} are" if name == "logits" else f"only tensor, {name}, is"
    return parts[name], f"{kind}, whose {where} taken"


def modules_in(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a function, a bound method or a functools.partial refers to, each once."""
    inner = getattr(function, "func", function)
    values = [getattr(inner, "__self__", None), *getattr(function, "args", ())]
    values += getattr(function, "keywords", {}).values()
    try:
        names = inspect.getclosurevars(inner)
        values += [*names.nonlocals.values(), *names.globals.values()]
    except TypeError:  # not a function of Python's own
        values += [function, *vars(function).values()] if hasattr(function, "__dict__") else []
    return list(dict.fromkeys(value for value in values if isinstance(value, nn.Module)))


def default_place() -> torch.device | None:
    """The default device of the surroundings; None for the CPU, which needs no word."""
    found = torch.get_default_device()
    return None if found.type == "cpu" else found


def without_inference(module: Any) -> Any:
    """``module``, or a copy of it where its parameters were made in inference mode, which no gradient can pass."""
    return copy.deepcopy(module) if any(part.is_inference() for part in parts_of(module)) else module


@contextmanager
def undisturbed() -> Iterator[None]:
    """Gradients, float32 and the CPU as a fresh process has them; defaults and all random streams are put back."""
    default, python, numpy = torch.get_default_dtype(), random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if default_place() is not None:
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(rng.put_back())
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def buffers_kept(*modules: nn.Module) -> Iterator[None]:
    """Buffers that the modules change when they are called, such as running statistics, are put back."""
    parts = [part for module in modules for part in module.modules()]
    kept = [(part, *named, named[1].detach().clone()) for part in parts for named in part.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for part, name, buffer, value in kept:
            if not torch.equal(getattr(part, name), value):
                buffer.detach().copy_(value)
                setattr(part, name, buffer)
