"""The cluster on one machine, as far as nothing is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from infra import local_cluster


def test_no_two_parts_are_promised_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([21_000, 20_000, 21_000, 20_500, 21_999])
    highest: list[int] = []

    def randrange(low: int, high: int) -> int:
        highest.append(high - 1)
        return next(drawn)

    monkeypatch.setattr(local_cluster.random, "randrange", randrange)
    monkeypatch.setattr(local_cluster, "_is_free", lambda port: True)
    assert local_cluster.free_ports(2, offset=10_000, but=(30_000, 30_500)) == [21_000, 21_999]
    assert all(port + 10_000 < 32_768 for port in highest)  # from there up the system gives them to connections


def test_ports_of_object_storage_are_given_to_no_other_part_and_to_no_other_cluster(tmp_path: Path) -> None:
    made = local_cluster.Cluster(tmp_path)
    try:
        storage = [taken for port in made.facts["s3"] for taken in (port, port + 10_000)]
        assert not any(map(local_cluster._is_free, storage))
        for port in storage:
            socket.create_server(("127.0.0.1", port)).close()  # as SeaweedFS listens there
        others = local_cluster.free_ports(1000)
        assert min(others) >= 22_000
        assert max(others) < 30_000
    finally:
        made.down()


def test_ports_are_below_those_of_this_system() -> None:
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(file.read_text().split()[0]) if file.exists() else 49_152
    assert first >= local_cluster.HANDED_OUT
