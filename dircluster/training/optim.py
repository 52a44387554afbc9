"""Optimizers of a stage, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dircluster.config import OptimizerConfig
from dircluster.distributed.parallel import shard_like


def make_optimizer(parameters: list[Tensor], knobs: OptimizerConfig) -> torch.optim.Optimizer:
    if knobs.name == "sgd":
        return torch.optim.SGD(parameters, lr=knobs.lr, momentum=knobs.momentum, weight_decay=knobs.weight_decay)
    betas = (knobs.momentum, knobs.beta2)
    return torch.optim.AdamW(parameters, lr=knobs.lr, betas=betas, weight_decay=knobs.weight_decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """An optimizer's state by parameter name: ``NAME|momentum_buffer`` and the like."""
    found = {
        f"{names[parameter]}|{kind}": value
        for parameter, entry in optimizer.state.items()
        for kind, value in entry.items()
        if isinstance(value, Tensor)
    }
    return dict(sorted(found.items()))  # workers gather shards one by one, in the same order


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    optimizer.state.clear()
    for name, value in sorted(tensors.items()):
        owner, _, kind = name.rpartition("|")
        parameter = parameters[owner]
        optimizer.state[parameter][kind] = value if kind == "step" else shard_like(value, parameter)
