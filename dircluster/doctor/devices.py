"""Several processes on this machine, one a GPU: how fast they exchange, and whether they train as one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from dircluster.config import ConfigError, RunConfig
from dircluster.cores import cores
from dircluster.distributed.launch import WorkerError, on_local_workers
from dircluster.distributed.parallel import Parallel
from dircluster.doctor.findings import Finding, at_most, largest, seen, skipped
from dircluster.doctor.machine import Machine, pictures, plain, stepper, true_fp32
from dircluster.training.profiling import mean_seconds, now
from dircluster.training.stages import stages_of

STEPS = 3
"""Steps whose losses are compared."""
APART = 1e-3
"""Largest relative difference of a loss from that of one process."""


def several(machine: Machine, budget: float) -> Iterator[Finding]:
    """An all-reduce, and steps by DDP and FSDP, on all GPUs; on two processes where there are none."""
    workers = torch.cuda.device_count() if machine.gpu else 2
    if workers == 1:
        yield skipped("several devices", "there is one GPU")
        return
    if not machine.gpu and cores() < workers:
        yield skipped("several devices", "there are neither GPUs nor two CPUs")
        return
    size = workers * (16 if machine.gpu else 4)
    scaling = dataclasses.replace(machine.config.scaling, workers=workers, threads=None if machine.gpu else 1)
    config = plain(dataclasses.replace(machine.config, scaling=scaling), batch_size=size, microbatch=None)
    one, _ = losses(config, "ddp", machine.parallel)
    try:
        found = on_local_workers(scaling, _member, config, within=0.9 * budget)
    except WorkerError:
        raise
    except ConfigError as error:  # such as a recipe that one worker alone can train
        yield skipped("several devices", str(error))
        return
    except TimeoutError as error:
        if machine.gpu:  # where it may be an exchange that hangs
            raise
        yield Finding("several devices", "warn", note=str(error))
        return
    kind = "nccl" if machine.gpu else "gloo"
    note = f"{kind}, {workers} processes, {found['bytes'] / 2**20:.0f} MiB"
    yield seen("all-reduce", found["bytes a second"] / 1e9, "GB/s sent by each", note)
    for strategy in ("ddp", "fsdp"):
        apart = largest(abs(a - b) / abs(a) for a, b in zip(one, found[strategy], strict=True))
        note = f"{found[f'{strategy} seconds']:.2f} s a step of {size} images"
        yield at_most(f"losses by {strategy}, apart", apart, APART, note=note)


def losses(config: RunConfig, strategy: Any, parallel: Parallel) -> tuple[list[float], float]:
    """Of some steps of the run's last stage in fp32, over all of the group, and the seconds of one after the first.

    Without a mean of weights, which no loss depends on and which fsdp does not keep.
    """
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, strategy=strategy))
    split = pictures(config.data, STEPS * config.training.batch_size)
    with true_fp32(), stepper(config, stages_of(config)[-1].name, split, parallel, ema=None) as made:
        found = [made.step(0)[0]["loss"]]
        began = now(parallel.device)
        found += [made.step(step)[0]["loss"] for step in range(1, STEPS)]
        return found, (now(parallel.device) - began) / (STEPS - 1)


def _member(parallel: Parallel, config: RunConfig) -> dict[str, Any]:
    """What one process of the group finds: bytes a second, losses and seconds a step by each strategy."""
    values = torch.ones(2**26 if parallel.device.type == "cuda" else 2**22, device=parallel.device)
    seconds = mean_seconds(lambda: dist.all_reduce(values), parallel.device, 5, warm=2)
    sent = 2 * values.nbytes * (parallel.world - 1) / parallel.world
    found: dict[str, Any] = {"bytes": values.nbytes, "bytes a second": sent / seconds}
    for strategy in ("ddp", "fsdp"):
        found[strategy], found[f"{strategy} seconds"] = losses(config, strategy, parallel)
    return found
