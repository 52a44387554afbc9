"""Normal noise as a function of a key and a counter: any part of a long random walk, on any device, without a state.

A Langevin chain of 1,500 steps takes megabytes of noise an image. Where the noise follows from a key, the key is all
that has to be drawn, held fixed, sent to a device or met again in a backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64, no product of which overflows (Wellons, hash-prospector)."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK
    return x ^ (x >> 15)


def counted_normal(keys: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values: keys (N,) int64 from 0 to 2^62 - 1 -> (N, *shape) float32.

    They differ for every key, step and place, and are the same on all devices up to rounding (Box and Muller 1958).
    """
    half = -(-math.prod(shape) // 2)
    place = torch.arange(2 * half, device=keys.device)
    low, high = keys & MASK, keys >> 32
    first = _mix(low ^ ((step * GOLDEN) & MASK))
    second = _mix(first ^ high)
    mixed = _mix(_mix((place + first[:, None]) & MASK) ^ second[:, None])
    radius, angle = ((mixed.double() + 0.5) / 2**32).float().chunk(2, dim=1)
    length = (-2 * radius.clamp_min(1e-10).log()).sqrt()
    pairs = torch.cat([length * (2 * math.pi * angle).cos(), length * (2 * math.pi * angle).sin()], dim=1)
    return pairs[:, : math.prod(shape)].reshape(len(keys), *shape)
