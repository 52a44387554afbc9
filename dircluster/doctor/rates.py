"""What is installed and how much room there is; how fast the device copies and multiplies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from dircluster.doctor.findings import Finding, at_least, at_most, seen
from dircluster.doctor.machine import PLACES, Machine, true_fp32
from dircluster.training.profiling import device_name, mean_seconds, product_rate

GIB = 2**30
ROOM = {"memory": 2.0, "disk": 2.0, "shared memory": 0.05, "GPU memory": 8.0}
"""GiB that should be free: of memory for a worker and its driver, of shared memory for Ray's smallest object store."""
BUSY = 0.5
"""Processes a core that want to run: with more, times are not the machine's own."""
SOUND_CUDNN = 91501
"""Attention of cuDNN before 9.15.1 reads out of bounds at lengths that 128 does not divide."""
MEASURED = {"NVIDIA H100 80GB HBM3": {"copy": 3.03e12, "bf16": 759e12, "tf32": 414e12, "fp32": 50e12}}
"""Bytes and operations a second that docs/results.md measured on a card of that name."""
SHARE = 0.8
"""Of what was measured on such a card, what another one should reach."""


def versions(machine: Machine, commit: str) -> Iterator[Finding]:
    """What runs here, as texts: this code, Python, PyTorch and what it was built for, Ray, MLflow, timm."""
    yield seen("dircluster", note=commit)
    yield seen(
        "machine", note=f"{device_name(machine.device)}; {platform.platform()}, Python {platform.python_version()}"
    )
    names = ("torch", "torchvision", "timm", "ray", "mlflow")
    yield seen("packages", note=", ".join(f"{name} {_version(name)}" for name in names))
    if machine.gpu:
        cudnn = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
        note = f"CUDA {torch.version.cuda}, driver {_driver()}, {torch.cuda.device_count()} GPU(s)"
        yield at_least("cuDNN", cudnn, SOUND_CUDNN, note=note, otherwise="warn")
        kinds = zip(("products", "convolutions"), PLACES, strict=False)
        yield seen("fp32 by default", note=", ".join(f"{kind} in {place.fp32_precision}" for kind, place in kinds))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown: there is no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]


def room(machine: Machine) -> Iterator[Finding]:
    """Memory, disk and shared memory that are free, in GiB, and whether others use the cores."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    yield at_most("load before", load, BUSY, "a core", "mean of the last minute", otherwise="warn")
    free = {"memory": psutil.virtual_memory().available, "disk": shutil.disk_usage(tempfile.gettempdir()).free}
    shared = Path("/dev/shm")
    if shared.is_dir():
        free["shared memory"] = shutil.disk_usage(shared).free
    if machine.gpu:
        free["GPU memory"] = torch.cuda.mem_get_info(machine.device)[0]
    for name, size in free.items():
        yield at_least(f"free {name}", size / GIB, ROOM[name], "GiB", otherwise="warn")


def rates(machine: Machine) -> Iterator[Finding]:
    """Bytes a second of a copy, read and written, and operations a second of square products; kept on ``machine``."""
    known = MEASURED.get(device_name(machine.device), {})
    yield _rate("copy", _copy_rate(machine), "GB/s", known)
    for name in ("fp32", "bf16", *(("tf32",) if machine.gpu else ())):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        with true_fp32("tf32" if name == "tf32" else "ieee"):
            machine.rates[name] = product_rate(machine.device, dtype)
        yield _rate(f"products in {name}", machine.rates[name], "GFLOP/s", known)


def _copy_rate(machine: Machine) -> float:
    source = torch.empty(2**28 if machine.gpu else 2**24, device=machine.device).uniform_()
    other = torch.empty_like(source)
    return 2 * source.nbytes / mean_seconds(lambda: other.copy_(source), machine.device, 10)


def _rate(name: str, rate: float, unit: str, known: dict[str, float]) -> Finding:
    """A rate in units of 1e9, against what was measured on a card of that name."""
    best = known.get(name.removeprefix("products in "))
    if best is None:
        return seen(name, rate / 1e9, unit)
    return at_least(name, rate / 1e9, SHARE * best / 1e9, unit, f"{best / 1e9:,.0f} measured before", "warn")
