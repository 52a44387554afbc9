"""The processes that share a step: their devices, their threads, and their group."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dircluster.config import ConfigError, RunConfig, ScalingConfig, error_from_plain, error_to_plain, named_line
from dircluster.cores import cores
from dircluster.distributed.parallel import Parallel

MARGIN = 60.0
"""Seconds by which workers wait longer for each other than one of them may wait for storage."""


class WorkerError(ConfigError):
    """A worker of this machine failed by what is no error of its settings."""


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


def choose_kernels(device: torch.device) -> None:
    """Let convolutions on a GPU use the kernels that are fastest for their shapes, of which a training has few."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def set_threads(scaling: ScalingConfig, workers_here: int) -> None:
    """Share this machine's cores among the workers on it."""
    torch.set_num_threads(scaling.threads or max(1, cores() // workers_here))


def most_wait(run: RunConfig) -> float:
    """Seconds that the workers of a run wait for each other: storage may keep the first of them at a stage's end."""
    return max(run.scaling.stall, run.storage.patience + MARGIN)


@contextmanager
def local_workers(scaling: ScalingConfig, timeout: float | None = None) -> Iterator[Parallel]:
    """One process, or the workers that torchrun or Ray Train started: both set RANK, WORLD_SIZE and LOCAL_RANK.

    They wait for each other at most ``timeout`` seconds, ``scaling.stall`` where it is not given.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    workers_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(scaling, local_rank, workers_here)
    set_threads(scaling, workers_here)
    choose_kernels(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout or scaling.stall))
    try:
        yield Parallel(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


def on_local_workers(
    scaling: ScalingConfig, work: Callable[..., Any], *arguments: Any, within: float | None = None
) -> Any:
    """``work(parallel, *arguments)`` on ``scaling.workers`` new processes of this machine: -> what the first returns.

    ``work`` is a function of a module and returns plain data. Where one of them fails, raises its ConfigError, or
    WorkerError in one line; TimeoutError where they take longer than ``within`` seconds.
    """
    processes, groups, log = _untyped(mp), _untyped(dist), logging.getLogger("torch.multiprocessing.spawn")
    level = log.level
    log.setLevel(logging.ERROR)  # that it ends the others is no news
    with tempfile.TemporaryDirectory(prefix="dircluster-") as folder:
        try:
            store = groups.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            given = (scaling, store.port, folder, work, arguments)
            started = processes.spawn(_worker, given, scaling.most, join=False, daemon=True)  # none outlives this one
            done = _joined(started, within)
        except (processes.ProcessRaisedException, processes.ProcessExitedException, RuntimeError, OSError) as error:
            errors = sorted(Path(folder).glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
            if errors:
                raise error_from_plain(json.loads(errors[0].read_text())) from error
            last = str(error).strip().splitlines()[-1:] or [named_line(error)]  # of a child's traceback
            raise WorkerError(f"workers on this machine failed: {last[0]}") from error
        finally:
            log.setLevel(level)
        if not done:
            raise TimeoutError(f"{scaling.most} processes were not done within {within:.0f} s")
        return json.loads((Path(folder) / "result").read_text())


def _joined(started: Any, within: float | None) -> bool:
    """Whether all processes have ended within so many seconds. None is left when it returns."""
    ends = time.monotonic() + (math.inf if within is None else within)
    try:
        while (left := ends - time.monotonic()) > 0:
            if started.join(None if within is None else left):
                return True
        return False
    finally:
        for process in started.processes:
            process.kill()
        for process in started.processes:
            process.join()


def _worker(
    rank: int, scaling: ScalingConfig, port: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    world = str(scaling.most)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    file = Path(folder) / f"error-{rank}"
    # The inner one keeps an error while the group is there: others fail when it is gone, and later.
    with _keeps_error(file), local_workers(scaling) as parallel, _keeps_error(file):
        result = work(parallel, *arguments)
    if rank == 0:
        (Path(folder) / "result").write_text(json.dumps(result))


@contextmanager
def _keeps_error(file: Path) -> Iterator[None]:
    """What fails inside is kept in ``file``, and ends this process."""
    try:
        yield
    except Exception as error:
        line = f"a worker on this machine failed: {named_line(error)}"
        known = error if isinstance(error, ConfigError) else WorkerError(line)
        file.write_text(json.dumps(error_to_plain(known)))
        raise SystemExit(1) from error


def _untyped(module: Any) -> Any:
    """A module of PyTorch's whose types leave out what it documents."""
    return module
