"""What sweeps find again: a result belongs to its settings and to the files they name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dircluster.cluster import storage
from dircluster.cluster.runtime.driver import forget
from dircluster.cluster.sweeps.store import Failures, Notes, key_of, result_of, store
from dircluster.config import RunConfig, StorageConfig, with_values
from dircluster.evaluation.sweep_table import Trial
from dircluster.presets import preset

FOUND = Trial({"dir.alpha": 2.0}, 0, "FINISHED", 0.5, 0.9, 0.4, (0.9, 0.3), 1.5, "final")


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return replace(preset("digits"), storage=StorageConfig(uri=str(tmp_path / "runs")))


def key_in_a_new_process(run: RunConfig, until: str = "") -> str:
    storage.version.cache_clear()
    return key_of(run, until)


def test_a_result_is_found_again_by_its_settings(run: RunConfig) -> None:
    assert result_of(run) is None
    store(run, FOUND)
    found = result_of(replace(run, name="another", scaling=replace(run.scaling, workers=2)))
    assert found == replace(FOUND, bare=[0.9, 0.3])  # type: ignore[arg-type]
    assert result_of(with_values(run, {"dir.alpha": 0.0})) is None
    assert result_of(run, "pretrain") is None


@pytest.mark.parametrize("text", ["", "{", json.dumps({"of": "another version"})])
def test_what_is_not_whole_is_no_result(run: RunConfig, text: str, tmp_path: Path) -> None:
    store(run, FOUND)
    (place,) = (tmp_path / "runs" / "trials").iterdir()
    place.write_text(text)
    assert result_of(run) is None


@pytest.mark.parametrize("given", [{"target.uri": "target"}, {"data.uri": "data"}])
@pytest.mark.parametrize("until", ["", "target", "pretrain"])
def test_a_result_is_none_of_files_that_were_replaced(
    run: RunConfig, given: Mapping[str, Any], until: str, tmp_path: Path
) -> None:
    ((name, uri),) = given.items()
    folder = tmp_path / uri
    run = with_values(run, {name: str(folder)})
    unseen = key_in_a_new_process(run, until)
    folder.mkdir()
    (folder / "first").write_text("one")
    one = key_in_a_new_process(run, until)
    assert one == key_in_a_new_process(run, until)
    (folder / "second").write_text("two")
    two = key_in_a_new_process(run, until)
    (folder / "first").write_text("three")
    assert len({unseen, one, two, key_in_a_new_process(run, until)}) == 4


def test_a_file_is_told_from_another_of_its_name_and_a_model_of_timm_is_none(tmp_path: Path) -> None:
    file, link = tmp_path / "target.safetensors", tmp_path / "given" / "target.safetensors"
    link.parent.mkdir()
    link.symlink_to(file)
    found = []
    for content in (b"one", b"two"):
        file.write_bytes(content)
        for uri in (str(file), f"file://{file}", str(link.parent)):
            storage.version.cache_clear()
            found.append(storage.version(uri, StorageConfig()))
    one, same, linked, two, _, relinked = found
    assert one == same
    assert len({one, two, linked, relinked}) == 4
    assert storage.version("timm:resnet18", StorageConfig()) == ""


def test_notes_of_a_search_are_found_again_in_order(run: RunConfig) -> None:
    notes = Notes(run, "mine", "key")
    assert notes.points() == []
    assert notes.stopped({"dir.alpha": 1.0}, 0) is None
    for number, alpha in enumerate((2.0, 1.0)):
        notes.add_point(number, {"dir.alpha": alpha})
    stopped = Trial({"dir.alpha": 1.0}, 0, "STOPPED", 0.2)
    notes.add_stopped(stopped)
    again = Notes(run, "mine", "key")
    assert again.points() == [{"dir.alpha": 2.0}, {"dir.alpha": 1.0}]
    assert again.stopped({"dir.alpha": 1.0}, 0) == stopped
    assert again.stopped({"dir.alpha": 1.0}, 1) is None
    assert Notes(run, "mine", "another").points() == []


def test_two_drivers_of_one_search_keep_the_points_of_both(run: RunConfig) -> None:
    first, second = Notes(run, "mine", "key"), Notes(run, "mine", "key")
    for notes, alphas in ((first, (2.0, 1.0)), (second, (2.0, 3.0))):
        for number, alpha in enumerate(alphas):
            notes.add_point(number, {"dir.alpha": alpha})
    assert sorted(point["dir.alpha"] for point in first.points()) == [1.0, 2.0, 3.0]


def test_a_failure_is_found_by_the_call_of_tune_that_it_belongs_to(run: RunConfig, tmp_path: Path) -> None:
    failed = Trial({"dir.alpha": 1.0}, 2, "FAILED", error="loss is not finite")
    Failures(run, "one").add(failed)
    assert Failures(run, "one").of({"dir.alpha": 1.0}, 2) == failed
    assert Failures(run, "one").of({"dir.alpha": 1.0}, 1) is None
    assert Failures(run, "two").of({"dir.alpha": 1.0}, 2) is None
    assert result_of(run) is None
    forget(run, "one")
    assert not (tmp_path / "runs" / "ray").exists()
