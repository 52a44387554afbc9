"""Whether a file can be written is known before anything is done that it would hold."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dircluster.files import check_file, check_writable, replacing, write_whole


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


@pytest.mark.parametrize("write", [check_writable, lambda folder: write_whole(folder / "s.json", b"later")])
def test_a_full_disk_keeps_nothing_of_what_did_not_fit(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, blob: bytes) -> int:
        file.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_of_one_number_do_not_write_into_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as in two containers
    file = tmp_path / "s.json"
    with replacing(file) as slow:
        slow.write_bytes(b"the first half")
        write_whole(file, b"whole")
        assert slow.read_bytes() == b"the first half"
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"the first half"]


def test_what_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text("earlier")

    def leave() -> None:
        with replacing(file) as partial:
            partial.write_text("some")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave()
    assert [each.read_text() for each in tmp_path.iterdir()] == ["earlier"]
