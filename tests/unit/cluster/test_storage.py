"""A copy of a checkpoint never takes away what another job reads there."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from dircluster.cluster import storage


def test_a_copy_that_is_not_made_to_its_end_leaves_what_was_there(tmp_path: Path) -> None:
    source, target = tmp_path / "fetched", tmp_path / "given"
    source.mkdir()
    weights = bytes(range(256)) * 40
    (source / "weights.safetensors").write_bytes(weights)
    (source / "COMMIT").write_bytes(b"digest")
    storage.copy(source, target)  # by the job that came first
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match="too large"):
            storage.copy(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (target / "weights.safetensors").read_bytes() == weights
    assert (target / "COMMIT").read_bytes() == b"digest"
