"""What is no lock of another job is not called one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dircluster.config import ConfigError
from dircluster.training.locks import TakenOverError, stage_lock


def test_a_folder_is_held_by_one_job_at_a_time(tmp_path: Path) -> None:
    folder, busy = tmp_path / "stage", pytest.raises(TakenOverError, match="another job is training")
    with stage_lock(folder, "first", print), busy, stage_lock(folder, "second", print):
        pass
    with stage_lock(folder, "second", print) as check:
        check()


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot lock") as found, stage_lock(tmp_path / "file" / "stage", "1", print):
        pass
    assert not isinstance(found.value, TakenOverError)
