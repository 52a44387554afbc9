"""How many rows, images times draws, pass through a model at a time where none are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dircluster.attacks.gradient import value_and_grad
from dircluster.config import USUAL_ROWS
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import under_attack
from dircluster.models.precision import exact

MOST_ROWS = 2048
"""On a GPU: past it a pass does not become faster."""
FEW = 32
"""Rows that are passed to learn what one takes, and then twice as many."""


def fitting_rows(victim: VictimModel, images: Tensor) -> int:
    """The usual rows on a CPU; on a GPU as many as fit, by what gradients of ``images`` (N, C, H, W) take there."""
    if images.device.type != "cuda":
        return USUAL_ROWS
    return doubled(lambda rows: peak(lambda: gradient(victim, images, rows), images.device), free(images.device))


def doubled(bytes_of: Callable[[int], int], available: int) -> int:
    """The usual rows, doubled while the bytes that they are thought to take are at most half of those available."""
    few, more = bytes_of(FEW), bytes_of(2 * FEW)
    rows = USUAL_ROWS
    while rows < MOST_ROWS and more + (more - few) / FEW * (2 * rows - 2 * FEW) <= available / 2:
        rows *= 2
    return rows


def gradient(victim: VictimModel, images: Tensor, rows: int) -> None:
    """One gradient of so many rows in fp32, which takes most; the victim and all random streams stay as they are."""
    asked = images[torch.arange(rows, device=images.device) % len(images)]
    with under_attack(*victim.modules), exact(images.device):
        value_and_grad(lambda x: victim.model("fresh", 0)(x).sum(dim=1))(asked)


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of a GPU that ``work`` takes at most, besides those that are in use.

    It is done once before: in their first pass libraries try kernels, some of which take more memory than all of it.
    """
    work()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def free(device: torch.device) -> int:
    """Bytes of a GPU that PyTorch can have: what nobody has, and what it keeps for itself."""
    unused, _ = torch.cuda.mem_get_info(device)
    return unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
