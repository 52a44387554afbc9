"""Several workers as one: process group, DDP, FSDP2, sums over workers."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dircluster.config import ConfigError, error_from_plain, error_to_plain
from dircluster.distributed.deterministic import (
    PairwiseSum,
    average_gradients,
    keeps_statistics_apart,
    normalize_globally,
    scatter_gradients,
)
from dircluster.models.classifiers import BasicBlock
from dircluster.models.transformer import Block

SHARDED_ALONE = (Block, BasicBlock)
"""Layers whose weights are gathered, used and dropped as one; what is left of a model is gathered with it."""
_ASKED = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _ASKED)
"""What DDP calls that a step makes buffers equal: the second name up to PyTorch 2.14."""


@dataclass(frozen=True)
class Parallel:
    """This process's place among the workers, and what they do together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this worker writes, logs and draws pictures."""
        return self.rank == 0

    def wrap(
        self, module: nn.Module, trained: Sequence[str], strategy: str, half: bool, pending: PairwiseSum
    ) -> nn.Module:
        """``module`` with gradients averaged over the workers on backward, where there are several.

        ddp replicates it; fsdp shards its ``trained`` submodules in place, and gathers blocks in bf16 where ``half``.
        What lies ``pending`` of earlier micro-batches joins the average.
        """
        if self.world == 1:
            return module
        if strategy == "fsdp":
            for name in trained:
                _shard(module.get_submodule(name), half, self.device)
            return module
        apart: Any = {SYNC_BUFFERS: any(keeps_statistics_apart(module.get_submodule(name)) for name in trained)}
        wrapped = DistributedDataParallel(module, **apart)  # where they are not, a step waits once less
        average_gradients(wrapped, pending, self.device)
        return wrapped

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the workers, on each of them."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def clip(self, parameters: Sequence[Tensor], most: float) -> Tensor:
        """Scale gradients down to a norm of ``most`` over all ``parameters``, sharded or not; -> their norm before, ().

        Nothing waits for the device.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        parts = [_local(gradient) for gradient in gradients]
        norms = torch._foreach_norm(parts, 2, dtype=torch.float64)  # so that shards add up to what the whole gives
        squares = torch.stack(list(norms)).square().cumsum(0)[-1]  # one after the other: cumsum keeps to that on CPUs
        if any(isinstance(gradient, DTensor) for gradient in gradients):
            dist.all_reduce(squares)
        norm = squares.sqrt()
        torch._foreach_mul_(parts, (most / norm).clamp(max=1.0).to(parts[0].dtype))
        return norm

    def gather_rows(self, rows: Tensor, order: Tensor, total: int) -> Tensor:
        """Put every worker's ``rows`` at its places ``order`` of one (total, ...) tensor, on each worker's CPU."""
        full = torch.zeros((total, *rows.shape[1:]), dtype=torch.float64)
        full[order] = rows.double().cpu()
        if self.world > 1:
            full = full.to(self.device)
            dist.all_reduce(full)
        return full.cpu()

    def share(self, value: Any) -> Any:
        """The first worker's plain ``value``, on all workers. It travels as JSON: tuples arrive as lists."""
        if self.world == 1:
            return value
        blob = bytearray(json.dumps(value).encode()) if self.first else bytearray()
        size = torch.tensor([len(blob)], device=self.device)
        dist.broadcast(size, src=0)
        data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
        if self.first:
            data.copy_(torch.frombuffer(blob, dtype=torch.uint8))
        dist.broadcast(data, src=0)
        return value if self.first else json.loads(data.cpu().numpy().tobytes())

    def wait(self) -> None:
        """Until every worker has come this far: what the first one wrote can then be read."""
        if self.world > 1:
            dist.barrier()

    def first_does(self, work: Any) -> Any:
        """Run ``work()`` on the first worker; all get its plain result, or its ConfigError, of the same class."""
        outcome: dict[str, Any] = {}
        if self.first:
            try:
                outcome = {"result": work()}
            except ConfigError as error:
                self.share({"error": error_to_plain(error)})
                raise
        outcome = self.share(outcome)
        if "error" in outcome:
            raise error_from_plain(outcome["error"])
        return outcome["result"]

    def synchronize_statistics(self, module: nn.Module) -> nn.Module:
        """Batch normalization over the global batch instead of each worker's share."""
        return module if self.world == 1 else normalize_globally(module, self.device)


def gathered_half(layer: nn.Module) -> bool:
    """Whether a layer can be gathered in bf16: its statistics stay in fp32, and those with weights of bf16 are refused
    in a normalization.
    """
    return not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in layer.modules())


def _shard(module: nn.Module, half: bool, device: torch.device) -> None:
    """FSDP2 over all workers, in place. With ``half`` layers are gathered in bf16 where they can be; what is around
    them stays whole. Weights are brought row by row into memory, which FSDP asks for.
    """
    from timm.models.vision_transformer import Block as TimmBlock  # a target's; nothing else needs the seconds it takes

    alone = (*SHARDED_ALONE, TimmBlock)
    whole = MixedPrecisionPolicy()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else whole
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))  # by itself it is of GPUs where there are some
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for part in [*(m for m in module.modules() if isinstance(m, alone)), module]:
        sharded = fully_shard(
            part, mesh=mesh, mp_policy=policy if part is not module and gathered_half(part) else whole
        )
        scatter_gradients(sharded, device)
    for name in getattr(module, "forward_methods", ()):
        register_fsdp_forward_method(module, name)
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here works in place


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_full(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """A copy of every tensor in full, in this machine's memory; nothing where the worker does not ``keep`` it.

    All workers call it together where some are sharded: they are gathered one after the other.
    """
    made = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            made[name] = full.detach().to("cpu", copy=True).contiguous()
    return made


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole ``tensor`` on the device of ``model``, sharded as it is."""
    tensor = tensor.to(model.device)
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
    return tensor


def without_sync(module: nn.Module, last: bool) -> Any:
    """No gradient exchange in this context unless it is the ``last`` micro-batch of the step."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(last, recurse=False)
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def reshard(module: nn.Module) -> None:
    """Drop what is still gathered of sharded weights: it keeps the flags that it was gathered with (frozen or not)."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def accumulates(module: nn.Module) -> bool:
    """Whether ``module`` keeps the gradients of earlier micro-batches itself (FSDP does, out of sight)."""
    return any(isinstance(part, FSDPModule) for part in module.modules())
