"""torch.compile block by block: blocks of one kind share their graphs, and hooks stay on the modules around them."""

from __future__ import annotations

import os
import shutil
import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dircluster.config import ConfigError
from dircluster.models.classifiers import BasicBlock, PreActBlock
from dircluster.models.transformer import Block
from dircluster.models.unet import Unit

BLOCKS = (Block, BasicBlock, PreActBlock, Unit)
"""What is compiled of a network; one that has none of them runs as it is."""
GRAPHS = 64
"""Most graphs of one kind of block: a ResNet-18 has seven shapes of them, each under attack, in training and judged,
and another batch size is another graph. Past the limit of 8 that PyTorch has, blocks would run eager, silently."""
OFF = "use --training.compile off"


def compile_blocks(network: nn.Module, backend: Any = "inductor") -> nn.Module:
    """Compile the blocks of ``network`` in place, each for the shapes that it meets; -> the network.

    A module compiled with its hooks would be compiled again at each call: those of a run count signals.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for part in network.modules():
        if isinstance(part, BLOCKS):
            part.compile(dynamic=False, backend=backend)
    return network


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where blocks on ``device`` cannot be compiled: a CPU needs a C++ compiler, a GPU Triton, and
    that a C compiler and Python's headers, by which it builds what launches its kernels.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigError(f"training.compile needs Triton on a GPU, which is missing; {OFF}")
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            raise ConfigError(f"training.compile needs a C compiler on a GPU (gcc or clang), and none is found; {OFF}")
        scheme = "posix_prefix" if os.name == "posix" else sysconfig.get_default_scheme()  # as Triton looks for it
        header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
        if not header.exists():
            raise ConfigError(f"training.compile needs Python's headers on a GPU ({header} is missing); {OFF}")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(f"training.compile needs a C++ compiler on a CPU, and none is found; {OFF}") from error


def uncompiled(compiled: bool) -> AbstractContextManager[Any]:
    """Inside, what may have been ``compiled`` runs as it is: an evaluation has many batch sizes."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
