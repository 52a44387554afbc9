"""What a caller gives to be judged, as the evaluation takes it, or one line that says what is wrong with it."""

from __future__ import annotations

import operator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dircluster.config import ConfigError

ROUNDING = 1e-6
"""How far a pixel may lie outside [0, 1] for rounding alone."""


def as_images(given: Any) -> tuple[Tensor, list[str]]:
    """Images (N, C, H, W) in [0, 1], float32, detached, and notes on what changed. Raises ConfigError for others."""
    images = _tensor("images", given)
    if images.ndim != 4:
        raise ConfigError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
    if images.numel() == 0:
        raise ConfigError("there are no images to judge" if len(images) == 0 else "the images have no pixels")
    if not images.is_floating_point():
        raise ConfigError(f"images must be floats in [0, 1], got {images.dtype}; divide by 255")
    images = images.float()
    low, high = images.min().item(), images.max().item()
    if not images.isfinite().all() or low < -ROUNDING or high > 1 + ROUNDING:
        raise ConfigError(f"images must lie in [0, 1], got {low:g} to {high:g}")
    if low >= 0 and high <= 1:
        return images, []
    return images.clamp(0.0, 1.0), [f"pixels from {low:.9g} to {high:.9g} were clamped to [0, 1]"]


def as_labels(given: Any, images: int) -> Tensor:
    """Labels (N,), int64, from 0. Raises ConfigError for any others."""
    labels = _tensor("labels", given)
    if labels.shape != (images,) or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ConfigError(f"labels must be {images} whole numbers, got {labels.dtype} {tuple(labels.shape)}")
    labels = labels.long()
    if int(labels.min()) < 0:
        raise ConfigError(f"labels must be 0 or more, got {int(labels.min())}")
    return labels


def as_number(name: str, given: Any) -> float:
    """A number given as one, as a NumPy or tensor scalar, or as "8/255". Raises ConfigError for anything else.

    One of single precision stands for the nearest fraction of a denominator up to 1000, if it is that one rounded.
    """
    try:
        if isinstance(given, str):
            return float(Fraction(given.replace(" ", "")))
        number = float(given)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        raise ConfigError(f"{name} must be a number or a fraction such as 8/255, got {shown(given)}") from None
    if str(getattr(given, "dtype", "")).endswith("float32") and abs(number) < float("inf"):
        near = float(Fraction(number).limit_denominator(1000))
        return near if float(np.float32(near)) == number else number
    return number


def as_whole_number(name: str, given: Any) -> int:
    """A whole number given as one, as a NumPy or tensor scalar too. Raises ConfigError for anything else."""
    try:
        return operator.index(given)
    except TypeError:
        raise ConfigError(f"{name} must be a whole number, got {shown(given)}") from None


def shown(given: Any) -> str:
    """What was given, in a few signs on one line."""
    return " ".join(repr(given).split())[:60]


def _tensor(name: str, given: Any) -> Tensor:
    try:
        found = given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(f"{name} must be a tensor, an array or a list of numbers: {line}") from None
    if found.is_meta:
        raise ConfigError(f"{name} lie on the meta device, where nothing has a value")
    if found.is_nested or found.is_quantized:
        raise ConfigError(
            f"{name} must be a plain tensor of numbers, got a {'nested' if found.is_nested else 'quantized'} one"
        )
    found = found.detach() if found.layout is torch.strided else found.detach().to_dense()
    return found.clone() if found.is_inference() else found  # what was made in inference mode passes no gradient
