"""Several workers as one: process group, DDP, sums over workers. The only importer of torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dircluster.config import ConfigError, ScalingConfig


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

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` with gradients averaged over the workers on backward, where there are several."""
        trains = any(p.requires_grad for p in module.parameters())
        return DistributedDataParallel(module) if self.world > 1 and trains else module

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the workers, on each of them."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def gather_rows(self, rows: Tensor, order: Tensor, total: int) -> Tensor:
        """Put every worker's ``rows`` at its places ``order`` of one (total, ...) tensor, on each worker's CPU."""
        full = torch.zeros((total, *rows.shape[1:]), dtype=torch.float64)
        full[order] = rows.double().cpu()
        if self.world > 1:
            full = full.to(self.device)
            dist.all_reduce(full)
        return full.cpu()

    def share(self, value: Any) -> Any:
        """The first worker's plain ``value``, on all workers."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Until every worker has come this far: what the first one wrote can then be read."""
        if self.world > 1:
            dist.barrier()

    def first_does(self, work: Any) -> Any:
        """Run ``work()`` on the first worker; all get its result, or its ConfigError."""
        outcome: tuple[bool, Any] = (True, None)
        if self.first:
            try:
                outcome = (True, work())
            except ConfigError as error:
                outcome = (False, str(error))
        fine, value = self.share(outcome)
        if not fine:
            raise ConfigError(value)
        return value

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
        world, x = dist.get_world_size(), x.float()
        mean = _sum_with_gradient(x.mean(dim=(0, 2, 3))) / world
        centred = x - mean[:, None, None]
        variance = _sum_with_gradient(centred.square().mean(dim=(0, 2, 3))) / world
        if self.running_mean is not None and self.running_var is not None and self.momentum is not None:
            with torch.no_grad():
                count = x.numel() / x.shape[1] * world
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
