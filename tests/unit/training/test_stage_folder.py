"""A stage's folder says which versions of the code trained what lies in it."""

from __future__ import annotations

from pathlib import Path

from dircluster.training.stage_folder import StageFolder


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
