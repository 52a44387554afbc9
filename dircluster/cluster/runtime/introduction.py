"""How Ray Train's workers learn of each other: by the variables that torchrun sets, so that there is one way to join.

Ray's own TorchConfig would make the driver and the controller of a run import torch, four seconds each, one after the
other, before a worker begins.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import ray
from ray import train
from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    from ray.train._internal.base_worker_group import BaseWorkerGroup


class Introduction(BackendConfig):
    """For a trainer of Ray Train."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Introducing


class _Introducing(Backend):
    share_cuda_visible_devices = True
    """Each worker sees the GPUs of all workers on its node, and takes that of its local rank."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _meeting_point)
        worker_group.execute(_introduce, address, port)


def _meeting_point() -> tuple[str, int]:
    """Where the others find this worker: its node's address, and a port that is free."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind(("", 0))
        return address, int(free.getsockname()[1])


def _introduce(address: str, port: int) -> None:
    """Set what torchrun sets (https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables)."""
    context = train.get_context()
    os.environ.update(
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
