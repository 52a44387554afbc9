"""Several workers as one: process group, DDP, FSDP2, sums over workers. The only importer of torch.distributed.

On CPUs sums over micro-batches and workers are taken pairwise, ((a + b) + (c + d)): the same bits for 1, 2, 4, ...
workers, sharded or not. NCCL sums in its own order.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dircluster.config import ConfigError, ScalingConfig, error_from_plain, error_to_plain
from dircluster.models.classifiers import BasicBlock
from dircluster.models.denoiser import MaskedDenoiser

SHARDED_ALONE = (Block, BasicBlock)
"""Layers whose weights are gathered, used and dropped as one; what is left of a model is gathered with it."""


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
        self, module: nn.Module, trained: Sequence[str], strategy: str, half: bool, aside: PairwiseSum
    ) -> nn.Module:
        """``module`` with gradients averaged over the workers on backward, where there are several.

        ddp replicates it; fsdp shards its ``trained`` submodules in place, and gathers weights in bf16 where ``half``.
        What lies ``aside`` of earlier micro-batches joins the average.
        """
        if self.world == 1:
            return module
        if strategy == "fsdp":
            for name in trained:
                _shard(module.get_submodule(name), half, ordered=self.device.type == "cpu")
            return module
        wrapped = DistributedDataParallel(module)
        exchange: Any = _average_bucket if self.device.type == "cpu" else allreduce_hook
        # DDP checks annotations, which are strings in this file: a lambda has none.
        wrapped.register_comm_hook(aside, lambda state, bucket: exchange(None, _joined(state, bucket)))
        return wrapped

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the workers, on each of them."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def clip(self, parameters: Sequence[Tensor], most: float) -> float:
        """Scale gradients down to a norm of ``most`` over all ``parameters``, sharded or not; -> their norm before."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient in gradients:  # in double, so that shards add up to what the whole gives
            norm = torch.linalg.vector_norm(_local(gradient), dtype=torch.float64)
            squares += norm.square()
        if any(isinstance(gradient, DTensor) for gradient in gradients):
            dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if norm > most:
            for gradient in gradients:
                gradient.mul_(most / norm)
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

    def synchronise_statistics(self, module: nn.Module) -> nn.Module:
        """Batch normalisation over the global batch instead of each worker's share.

        On CPUs, layers derived from BatchNorm2d stay as they are: each worker then has statistics of its own.
        """
        if self.world == 1:
            return module
        if self.device.type == "cuda":
            from timm.layers import convert_sync_batchnorm  # knows timm's own layers too

            converted: nn.Module = convert_sync_batchnorm(module)
            return converted
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                child.__class__ = GlobalBatchNorm2d
            else:
                setattr(module, name, self.synchronise_statistics(child))
        return module


class PairwiseSum:
    """Gradients of micro-batches, set aside and summed pairwise, as the workers' are: ((a + b) + (c + d))."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self._waiting: list[tuple[int, dict[Tensor, Tensor]]] = []

    def put(self) -> None:
        """Take the gradients off the parameters."""
        level, taken = 0, {p: p.grad for p in self.parameters if p.grad is not None}
        for parameter in taken:
            parameter.grad = None
        while self._waiting and self._waiting[-1][0] == level:
            for parameter, gradient in self._waiting.pop()[1].items():
                taken[parameter] = gradient.add_(taken[parameter])
            level += 1
        self._waiting.append((level, taken))

    def join(self, parameter: Tensor, gradient: Tensor) -> None:
        """Add, in place, what was set aside of ``parameter`` to its last micro-batch's ``gradient``."""
        for _, taken in reversed(self._waiting):
            gradient.add_(taken.pop(parameter))

    def join_all(self) -> None:
        """:meth:`join` for every parameter whose gradient no DDP has joined on its way."""
        for parameter in self.parameters:
            if parameter.grad is not None and self._waiting and parameter in self._waiting[-1][1]:
                self.join(parameter, parameter.grad)
        self._waiting.clear()


def _pairwise(rows: Tensor) -> Tensor:
    """Sum of the rows, pairs first: (n, m) -> (m,)."""
    while len(rows) > 1:
        even = len(rows) // 2 * 2
        rows = torch.cat([rows[0:even:2] + rows[1:even:2], rows[even:]])
    return rows[0]


def _share_of_sum(values: Tensor) -> Tensor:
    """This worker's part of the sum of all workers' ``values``: (world * n,) -> (n,)."""
    received = torch.empty_like(values)
    dist.all_to_all_single(received, values.contiguous())
    return _pairwise(received.view(dist.get_world_size(), -1))


def _joined(aside: PairwiseSum, bucket: Any) -> Any:
    """``bucket`` with what was set aside of its parameters."""
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        aside.join(parameter, gradient)
    return bucket


def _average_bucket(group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's exchange on CPUs: the mean over workers, summed pairwise."""
    buffer, world = bucket.buffer(), dist.get_world_size()
    padded = torch.nn.functional.pad(buffer, (0, -len(buffer) % world))
    dist.all_gather_into_tensor(padded, _share_of_sum(padded))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer.copy_(padded[: len(buffer)]).div_(world))
    return done


class OrderedReduceScatter(ReduceScatter):
    """FSDP's exchange on CPUs: each worker's part of the mean, summed pairwise. It counts its calls."""

    calls = 0

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        OrderedReduceScatter.calls += 1
        output_tensor.copy_(_share_of_sum(input_tensor))
        if op == dist.ReduceOp.AVG:
            output_tensor.div_(dist.get_world_size())
        return None


def _shard(module: nn.Module, half: bool, ordered: bool) -> None:
    """FSDP2 over all workers, in place."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    for part in [*(m for m in module.modules() if isinstance(m, SHARDED_ALONE)), module]:
        sharded = fully_shard(part, mp_policy=policy)
        if ordered:
            sharded.set_custom_reduce_scatter(OrderedReduceScatter())
    if isinstance(module, MaskedDenoiser):
        register_fsdp_forward_method(module, "restore_each")
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here works in place


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """A copy of every tensor in full, in this machine's memory; nothing where the worker does not ``keep`` it.

    All workers call it together where some are sharded: they are gathered one after the other.
    """
    made = {}
    for name, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            made[name] = full.detach().to("cpu", copy=True).contiguous()
    return made


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole ``tensor`` on the device of ``model``, sharded as it is."""
    tensor = tensor.to(model.device)
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
    return tensor


class _Sum(torch.autograd.Function):
    """Sum over the workers; each worker's gradient is the sum of all workers' gradients."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed


def _sum_with_gradient(values: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return summed


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the global batch, for CPUs (SyncBatchNorm needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x = x.float()
        total = torch.tensor(float(x.numel() // x.shape[1]))
        dist.all_reduce(total)  # workers may hold shares of different size
        count = float(total)
        mean = _sum_with_gradient(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _sum_with_gradient(centred.square().sum(dim=(0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        shaped = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        scaled: Tensor = shaped * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled


def choose_device(scaling: ScalingConfig, local_rank: int, workers_here: int) -> torch.device:
    """A GPU of its own where asked for or to be had, else the CPU. Raises ConfigError where a GPU is missing."""
    found = torch.cuda.device_count()
    if scaling.device == "gpu" and found <= local_rank:
        raise ConfigError(
            f"scaling.device is gpu, but worker {local_rank} finds {found} GPUs; use --scaling.device cpu"
        )
    if scaling.device == "gpu" or (scaling.device == "auto" and found >= workers_here):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def set_threads(scaling: ScalingConfig, workers_here: int) -> None:
    """Share this machine's cores among the workers on it."""
    torch.set_num_threads(scaling.threads or max(1, (os.cpu_count() or 1) // workers_here))


@contextmanager
def local_workers(scaling: ScalingConfig) -> Iterator[Parallel]:
    """One process, or the workers that torchrun started (it sets RANK, WORLD_SIZE and LOCAL_RANK)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(scaling, local_rank, workers_here)
    set_threads(scaling, workers_here)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=scaling.stall))
    try:
        yield Parallel(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


def joined_workers(scaling: ScalingConfig, device: torch.device, workers_here: int) -> Parallel:
    """The workers of a process group that somebody else (Ray Train) has started."""
    set_threads(scaling, workers_here)
    if not dist.is_initialized():
        return Parallel(0, 1, device)
    return Parallel(dist.get_rank(), dist.get_world_size(), device)


def without_sync(module: nn.Module, last: bool) -> Any:
    """No gradient exchange in this context unless it is the ``last`` micro-batch of the step."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(last, recurse=False)
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def accumulates(module: nn.Module) -> bool:
    """Whether ``module`` keeps the gradients of earlier micro-batches itself (FSDP does, out of sight)."""
    return any(isinstance(part, FSDPModule) for part in module.modules())
