"""Which stages a plan finds finished in storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from dircluster.cluster.reproducing.stored import stored_stages
from dircluster.cluster.sweeps.store import key_of
from dircluster.config import RunConfig, with_values
from dircluster.presets import PRESETS, preset
from dircluster.reproduction.exhibits import LABELS
from dircluster.reproduction.plan import Plan, make_plan, preset_of
from dircluster.reproduction.tables import exhibits
from tests.conftest import Trained


def planned(storage: Path) -> tuple[Plan, RunConfig]:
    given = {"storage.uri": str(storage)}
    chosen = [exhibits("cifar10")[name] for name in ("table1", "fig6a")]
    plan = make_plan(chosen, "digits_smoke", given, (0,), ("identity", "dir"), key_of)
    return plan, with_values(preset("digits_smoke"), given)


def test_what_another_job_trained_is_found(trained: Trained) -> None:
    plan, config = planned(trained.folder / "runs")
    found = stored_stages(plan, config)
    there = {
        training.name: [s for s, key in training.stages.items() if key in found] for training in plan.trainings.values()
    }
    assert there.pop("identity, seed 0") == ["target"]
    assert there.pop("dir, seed 0") == ["target", "pretrain", "dir"]
    assert set(map(tuple, there.values())) == {("target", "pretrain")}  # other alphas


def test_of_an_empty_folder_no_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dircluster.cluster.reproducing.stored.load")
    plan, config = planned(tmp_path / "nothing")
    assert stored_stages(plan, config) == set()


@pytest.mark.parametrize("family", ["digits", "cifar10", "svhn", "digits_smoke"])
def test_all_systems_have_the_same_images(family: str) -> None:
    """One reading tells the fingerprint of all: they differ in what is done to training images alone."""
    own = {name: preset(name).data for name in (preset_of(family, system) for system in LABELS) if name in PRESETS}
    assert len(own) > 5
    decides = {(d.name, d.uri, d.limit, d.stream, d.resize, d.height, d.width, d.channels) for d in own.values()}
    assert len(decides) == 1
