"""Whether a file can be written is known before anything is done that it would hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from dircluster.files import check_file


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    check_file(file)
    assert list(tmp_path.iterdir()) == []
    file.write_text("earlier")
    check_file(file)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["earlier"]
    check_file(Path("/dev/null"))
    check_file(Path("/proc/self/comm"))  # its folder takes no other file


def test_what_cannot_be_written_is_an_error_that_says_why(tmp_path: Path) -> None:
    for file, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "absent" / "s.json", "its folder does not exist"),
        (Path("/proc/s.json"), "No such file"),
    ):
        with pytest.raises(OSError, match=message):
            check_file(file)
