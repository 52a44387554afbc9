"""Sums over micro-batches and workers in one order on CPUs: pairwise, ((a + b) + (c + d)).

The same bits for 1, 2, 4, ... workers, sharded or not. NCCL sums in its own order: :func:`in_order` is the switch, and
the functions below it are all that differs between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.nn.parallel import DistributedDataParallel


def in_order(device: torch.device) -> bool:
    """Whether sums over the workers on ``device`` are made in one order."""
    return device.type == "cpu"


def average_gradients(module: DistributedDataParallel, pending: PairwiseSum, device: torch.device) -> None:
    """Make DDP's exchange the mean over the workers of its gradients and of what lies ``pending``."""
    exchange: Any = _average_bucket if in_order(device) else allreduce_hook

    # DDP checks annotations, which are strings in this file: a lambda has none.
    module.register_comm_hook(pending, lambda state, bucket: exchange(None, _with_pending(state, bucket)))


def scatter_gradients(sharded: FSDPModule, device: torch.device) -> None:
    """Make FSDP's exchange each worker's part of the mean over the workers."""
    if in_order(device):
        sharded.set_custom_reduce_scatter(OrderedReduceScatter())


def normalize_globally(module: nn.Module, device: torch.device) -> nn.Module:
    """Batch normalization over the global batch instead of each worker's share.

    On CPUs, layers derived from BatchNorm2d stay as they are: each worker then has statistics of its own.
    """
    if not in_order(device):
        from timm.layers import convert_sync_batchnorm  # knows timm's own layers too

        converted: nn.Module = convert_sync_batchnorm(module)
        return converted
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = GlobalBatchNorm2d
    return module


def keeps_statistics_apart(module: nn.Module) -> bool:
    """Whether training may leave a worker buffers of its own: those of layers other than global normalization's."""
    shared = (GlobalBatchNorm2d, nn.SyncBatchNorm)
    return any(
        True for layer in module.modules() if not isinstance(layer, shared) for _ in layer.buffers(recurse=False)
    )


class PairwiseSum:
    """Gradients of micro-batches, kept pending and summed pairwise, as the workers' are: ((a + b) + (c + d))."""

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
        """Add, in place, what was kept pending of ``parameter`` to its last micro-batch's ``gradient``."""
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


def _with_pending(pending: PairwiseSum, bucket: Any) -> Any:
    """``bucket`` with what was kept pending of its parameters."""
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        pending.join(parameter, gradient)
    return bucket


def _average_bucket(group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's exchange on CPUs: the mean over workers, summed pairwise."""
    buffer, world = bucket.buffer(), dist.get_world_size()
    if world == 2:  # a + b is b + a: in one message, while backward goes on
        summed: Any = dist.all_reduce(buffer, async_op=True).get_future()
        averaged: torch.futures.Future[Tensor] = summed.then(lambda future: future.value()[0].div_(world))
        return averaged
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
        centered = x - mean[:, None, None]
        variance = _sum_with_gradient(centered.square().sum(dim=(0, 2, 3))) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
                # Without a momentum the running statistics are means over all batches so far.
                share = 1 / int(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(variance * (count / (count - 1)), share)
        shaped = centered * torch.rsqrt(variance + self.eps)[:, None, None]
        if not self.affine:
            return shaped
        scaled: Tensor = shaped * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled
