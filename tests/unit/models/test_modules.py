"""Helpers for any module."""

from __future__ import annotations

import torch

from dircluster.models.modules import to_bytes


def test_the_bytes_of_a_tensor_are_its_numbers_in_its_own_dtype() -> None:
    rows = torch.arange(6.0).reshape(2, 3)
    assert to_bytes(rows) == rows.numpy().tobytes()
    assert to_bytes(rows.t()) == rows.numpy().T.tobytes()
    assert to_bytes(torch.tensor(3)) == (3).to_bytes(8, "little")
    assert to_bytes(torch.ones(2, dtype=torch.bfloat16)) == b"\x80\x3f" * 2
    assert to_bytes(torch.zeros(0)) == b""
