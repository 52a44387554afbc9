"""What commands keep to go on from is found again as it was, or not at all."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from dircluster.cluster.plain_store import Store


def test_plain_data_and_files_are_kept_by_their_names(tmp_path: Path) -> None:
    kept = Store(tmp_path / "new")
    assert kept.get("points/1") is None
    kept.put("points/1", {"alpha": 2.0})
    kept.add_files({"figures/one.png": b"png"})
    assert Store(tmp_path / "new").get("points/1") == {"alpha": 2.0}
    assert (tmp_path / "new" / "figures" / "one.png").read_bytes() == b"png"


@pytest.mark.parametrize(
    "text", ["", '{"alpha": ', "[1]", "null", "[" * 100_000], ids=["empty", "cut", "list", "null", "deep"]
)
def test_what_is_not_whole_is_as_good_as_absent(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.json").write_text(text)
    assert Store(tmp_path).get("one") is None


def test_a_file_that_is_not_written_to_its_end_is_as_it_was(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    kept.put("factor", {"factor": 0.5})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match="too large"):
            kept.put("factor", {"factor": "0" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert kept.get("factor") == {"factor": 0.5}
