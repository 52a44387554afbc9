"""How Ray Train's workers learn of each other: by the variables that torchrun sets, so that there is one way to join.

Ray's own TorchConfig would make the driver and the controller of a run import torch, four seconds each, one after the
other, before a worker begins.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING

import ray
from ray import train
from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    from ray.train._internal.base_worker_group import BaseWorkerGroup

_HELD: list[socket.socket] = []
"""What keeps the port of a meeting from connections: this process imports torch for seconds before it listens there."""


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
    """Where the others find this worker: its node's address, and a port that nobody else is given until it ends."""
    address = ray.util.get_node_ip_address()
    free = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as who listens there does, so that both may have it
    free.bind(("", 0))
    port = int(free.getsockname()[1])
    if sys.platform == "linux":  # elsewhere one of them alone may have it
        _HELD.append(free)
    else:
        free.close()
    return address, port


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
