"""A stage's folder says whether it is finished, and which versions of the code trained what lies in it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from dircluster.presets.dir import DirRun
from dircluster.training import checkpoint
from dircluster.training.protocols import NoTracker
from dircluster.training.run import Run
from dircluster.training.stage_folder import StageFolder
from tests.conftest import ALONE
from tests.unit.training.conftest import Hears, elsewhere


@pytest.mark.parametrize("broken", [checkpoint.COMMIT, checkpoint.MANIFEST])
def test_a_result_that_cannot_be_read_is_made_again(
    smoke: DirRun, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(file: Path) -> bytes:
        if file.name == broken:
            raise OSError(errno.EIO, "Input/output error")
        return file.open("rb").read()

    stage, console = StageFolder("target", "0" * 64, tmp_path), Hears()
    checkpoint.write(stage.final, {}, {}, stage.key)
    run = Run(elsewhere(smoke, tmp_path), ALONE, NoTracker(), console)
    assert run._is_finished(stage)
    monkeypatch.setattr(Path, "read_bytes", reads)
    assert not run._is_finished(stage)
    (line,) = console.lines
    assert line.endswith(f"is damaged: {broken} cannot be read; making it again from the stage's checkpoints")


def test_versions_are_those_whose_checkpoints_count(tmp_path: Path) -> None:
    stage = StageFolder("target", "0" * 64, tmp_path)
    assert stage.trained_by == ()
    stage.add_version("a")
    stage.add_version("b")  # a came to no checkpoint
    assert stage.trained_by == ("b",)
    (tmp_path / "step-00000001").mkdir()
    stage.add_version("b")
    stage.add_version("c")
    assert stage.trained_by == ("b", "c")


def test_what_was_begun_before_versions_were_recorded_is_unknown(tmp_path: Path) -> None:
    stage = StageFolder("target", "0" * 64, tmp_path)
    (tmp_path / "step-00000001").mkdir()
    stage.add_version("a")
    assert stage.trained_by == ("unknown", "a")
