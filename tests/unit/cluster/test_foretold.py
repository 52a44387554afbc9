"""What a dry run foretold is found by the run that follows, and by no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dircluster.cluster import foretold
from dircluster.cluster.foretold import Foretold
from dircluster.config import RunConfig, StorageConfig
from dircluster.presets import preset

ROW = {"name": "dir", "seconds": 61.5, "memory": 2**30, "stored": 2**20}
MADE = Foretold("a CPU", [ROW])


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return replace(preset("digits_smoke"), storage=StorageConfig(uri=str(tmp_path / "runs")))


def test_the_same_settings_find_it_whatever_the_seed(run: RunConfig) -> None:
    assert foretold.kept(run, "ray") is None
    foretold.keep(MADE, run, "ray")
    assert foretold.kept(replace(run, seed=7), "ray") == MADE
    assert foretold.kept(run, "local") is None
    assert foretold.kept(replace(run, attack=replace(run.attack, steps=9)), "ray") is None
    assert foretold.kept(replace(run, scaling=replace(run.scaling, workers=2)), "ray") is None
    last = Foretold("another CPU", [{**ROW, "seconds": 2.0}])
    foretold.keep(last, run, "ray")
    assert foretold.kept(run, "ray") == last


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]", '{"rows": []}', '{"device": "a", "rows": [{"name": "dir"}]}', '{"device": "a", "rows": 1}'),
        '{"device": "a", "rows": [{"name": "dir", "seconds": 1}]}',
    ],
)
def test_what_is_no_forecast_is_none(run: RunConfig, text: str) -> None:
    foretold.keep(MADE, run, "ray")
    (file,) = Path(run.storage.uri).glob("forecasts/*.json")
    file.write_text(text)
    assert foretold.kept(run, "ray") is None


def test_storage_that_takes_none_is_no_error(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    foretold.keep(MADE, run, "ray")
    assert foretold.kept(run, "ray") is None
    away = replace(run, storage=replace(run.storage, uri="s3://bucket/runs"))
    foretold.keep(MADE, away, "ray")
    assert foretold.kept(away, "ray") is None


def test_only_what_was_done_is_compared(run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "dir-0"
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(10))
    outcome = {"seconds": {"dir": 70.04}, "resumed": ["dir"], "memory": {"dir": 3}, "folders": {"dir": str(folder)}}
    (row,) = foretold.beside(Foretold("a CPU", [ROW, {**ROW, "name": "target"}]), outcome, run.storage)
    assert row == {
        "name": "dir",
        "foretold": 61.5,
        "took": 70.0,
        "resumed": True,
        "foretold_memory": 2**30,
        "memory": 3,
        "foretold_stored": 2**20,
        "stored": 10,
    }
    assert foretold.beside(MADE, {"status": "FAILED"}, run.storage) == []
