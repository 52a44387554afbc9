"""Optimizers of a stage, and their state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dircluster.config import ConfigError, OptimizerConfig, RunConfig, TrainingConfig
from dircluster.distributed.parallel import Parallel, shard_like


def is_sharded(config: RunConfig, parallel: Parallel) -> bool:
    """Whether weights that are trained lie in shards."""
    return parallel.world > 1 and config.parallel.strategy == "fsdp"


def is_fused(training: TrainingConfig, device: torch.device, knobs: OptimizerConfig, sharded: bool) -> bool:
    """Whether an update of weights on ``device`` is one kernel: where asked for, and by itself on a GPU.

    That of SGD takes no weights that lie in shards (FSDP2). Raises ConfigError where it is asked for there.
    """
    if sharded and knobs.name == "sgd":
        if training.fused == "on":
            raise ConfigError("training.fused must be auto or off for SGD with parallel.strategy fsdp, got on")
        return False
    return training.fused == "on" or (training.fused == "auto" and device.type == "cuda")


def make_optimizer(parameters: list[Tensor], knobs: OptimizerConfig, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer of ``knobs`` at its peak rate."""
    kind = True if fused else None  # None leaves the choice among the unfused ones to PyTorch
    rate, decay = knobs.lr, knobs.weight_decay
    if knobs.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=knobs.momentum, weight_decay=decay, fused=kind)
    betas = (knobs.momentum, knobs.beta2)
    adam = torch.optim.Adam if knobs.name == "adam" else torch.optim.AdamW
    return adam(parameters, lr=rate, betas=betas, weight_decay=decay, fused=kind)


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
    """The inverse of :func:`optimizer_tensors`.

    The count of steps is whole on every worker: beside its parameter where a fused kernel reads it, else on the CPU.
    What goes with the weights lies in memory as they do, such as channels last: fused kernels take both number by
    number.
    """
    fused = {parameter for group in optimizer.param_groups if group["fused"] for parameter in group["params"]}
    optimizer.state.clear()
    for name, value in sorted(tensors.items()):
        owner, _, kind = name.rpartition("|")
        parameter = parameters[owner]
        if kind == "step":
            value = value.to(parameter.device if parameter in fused else "cpu")
        else:
            value = shard_like(value, parameter)
            if value.stride() != parameter.stride():
                value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][kind] = value
