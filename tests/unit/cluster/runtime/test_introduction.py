"""How workers of Ray Train learn where they meet."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from dircluster.cluster.runtime import introduction


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two cannot have one port")
def test_the_port_of_a_meeting_is_nobody_elses_until_workers_listen_there(no_ray: Callable[..., None]) -> None:
    no_ray(introduction, util=SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1"))
    address, port = introduction._meeting_point()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    store = TCPStore(address, port, is_master=True, wait_for_workers=False)
    assert store.port == port
