"""Bytes in use, and the most that were: of a GPU what PyTorch holds, of a CPU the process's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


def resting(device: torch.device) -> int:
    """Bytes in use now; the peak counts from here.

    On a GPU what nobody uses is freed first: steps refer to themselves, and would keep their networks and images.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):  # else freed memory counts as in use
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # else the peak is the process's since its start
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: torch.device) -> int:
    """The most bytes that were in use since :func:`resting`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of this process, as Linux counts them; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
