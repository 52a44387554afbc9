"""The cluster on one machine, as far as nothing is started."""

from __future__ import annotations

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
    assert local_cluster._free_ports(2, offsets=(0, 10_000), but=(30_000, 30_500)) == [21_000, 21_999]
    assert all(port + 10_000 < 32_768 for port in highest)  # from there up the system gives them to connections


def test_ports_are_below_those_of_this_system() -> None:
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(file.read_text().split()[0]) if file.exists() else 49_152
    assert first >= local_cluster.HANDED_OUT
