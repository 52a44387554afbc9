"""What is no lock of another job is not called one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from dircluster.config import ConfigError, with_values
from dircluster.presets.dir import DirRun
from dircluster.training import checkpoint, stage_folder, stages
from dircluster.training import run as module
from dircluster.training.locks import TakenOverError, stage_lock
from dircluster.training.protocols import NoTracker, Quiet
from tests.conftest import ALONE
from tests.unit.training.conftest import elsewhere


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


def test_of_two_jobs_that_are_given_one_target_the_second_writes_over_nothing(
    smoke: DirRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(stages.Networks(smoke, ALONE)["classifier"].state_dict(), tmp_path / "given.safetensors")
    config = with_values(elsewhere(smoke, tmp_path), {"target.uri": str(tmp_path / "given.safetensors")})
    begun, go, written, found, write = threading.Event(), threading.Event(), [], list[Any](), checkpoint.write

    def slow(folder: Path, *given: Any) -> str:
        written.append(folder)
        begun.set()
        assert go.wait(60)
        return write(folder, *given)

    def keep() -> None:
        found.append(module.Run(config, ALONE, NoTracker(), Quiet())._keep_given_target())

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(stage_folder, "KEEPS_SOON", 0.02)
    first = threading.Thread(target=keep)
    first.start()
    assert begun.wait(60)
    threading.Timer(0.3, go.set).start()
    keep()
    first.join()
    assert found[0] == found[1]
    assert len(written) == 1
    assert checkpoint.is_sound(written[0])
