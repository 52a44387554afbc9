"""The cluster on one machine, as far as nothing is started."""

from __future__ import annotations

import pytest

from infra import local_cluster


def test_no_two_parts_are_promised_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([21_000, 31_000, 21_000, 20_500, 22_000])
    monkeypatch.setattr(local_cluster.random, "randrange", lambda low, high: next(drawn))
    monkeypatch.setattr(local_cluster, "_is_free", lambda port: True)
    assert local_cluster._free_ports(2, offsets=(0, 10_000), but=(30_500,)) == [21_000, 22_000]
