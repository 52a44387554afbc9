"""Several processes on this machine, one a GPU: how fast they exchange, and whether they train as one does.

    python -m dircluster.doctor.devices < RUN.json

is one of them, within the group that RANK, WORLD_SIZE and MASTER_PORT of its environment name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from dircluster.config import ConfigError, RunConfig
from dircluster.distributed.launch import local_workers
from dircluster.distributed.parallel import Parallel
from dircluster.doctor.findings import Finding, at_most, largest, seen, skipped
from dircluster.doctor.machine import Machine, pictures, plain, trainer, true_fp32
from dircluster.presets import run_from_plain, run_to_plain
from dircluster.training.profiling import mean_seconds
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
    if not machine.gpu and (os.cpu_count() or 1) < workers:
        yield skipped("several devices", "there are neither GPUs nor two CPUs")
        return
    size = workers * (16 if machine.gpu else 4)
    scaling = dataclasses.replace(machine.config.scaling, workers=workers, threads=None if machine.gpu else 1)
    config = plain(dataclasses.replace(machine.config, scaling=scaling), batch_size=size, microbatch=None)
    one = losses(config, "ddp", machine.parallel)
    try:
        found = _group(config, workers, budget)
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


def losses(config: RunConfig, strategy: Any, parallel: Parallel) -> list[float]:
    """Of some steps of the run's last stage in fp32, over all of the group."""
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, strategy=strategy))
    split = pictures(config.data, STEPS * config.training.batch_size)
    with true_fp32(), trainer(config, stages_of(config)[-1].name, split, parallel) as made:
        return [made.step(step)[0]["loss"] for step in range(STEPS)]


def _group(config: RunConfig, workers: int, budget: float) -> dict[str, Any]:
    """What the first of ``workers`` processes reports.

    Raises ConfigError where one refuses, RuntimeError where one fails, and TimeoutError where they take too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command, given = [sys.executable, "-m", __name__], json.dumps(run_to_plain(config))
    processes = []
    for rank in range(workers):
        own = {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
        processes.append(subprocess.Popen(command, env={**os.environ, **own, "PYTHONPATH": path}, text=True, **pipes))
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(given)
            process.stdin.close()
            process.stdin = None
        ends = time.monotonic() + 0.9 * budget
        said = [process.communicate(timeout=max(1, ends - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{workers} processes were not done within {0.9 * budget:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, (_, error) in zip(processes, said, strict=True):
        if process.returncode:
            last = (error.strip().splitlines() or [f"a process of the group ended with {process.returncode}"])[-1]
            raise ConfigError(last) if process.returncode == 2 else RuntimeError(last)
    result: dict[str, Any] = json.loads(said[0][0].splitlines()[-1])
    return result


def _member(config: RunConfig) -> dict[str, Any]:
    """What one process of the group finds: bytes a second, losses and seconds a step by each strategy."""
    with local_workers(config.scaling) as parallel:
        values = torch.ones(2**26 if parallel.device.type == "cuda" else 2**22, device=parallel.device)
        seconds = mean_seconds(lambda: dist.all_reduce(values), parallel.device, 5, warm=2)
        sent = 2 * values.nbytes * (parallel.world - 1) / parallel.world
        found: dict[str, Any] = {"bytes": values.nbytes, "bytes a second": sent / seconds}
        for strategy in ("ddp", "fsdp"):
            began = time.monotonic()
            found[strategy] = losses(config, strategy, parallel)
            found[f"{strategy} seconds"] = (time.monotonic() - began) / STEPS
        return found


def main() -> int:
    """One process of the group; -> exit code."""
    try:
        found = _member(run_from_plain(json.load(sys.stdin)))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
