"""Which stages a plan finds finished in storage, and which systems judged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dircluster.cluster.console import Terminal
from dircluster.cluster.loading import JobSpec
from dircluster.cluster.reproducing.stored import Stored, find_stored, judged_units
from dircluster.cluster.runtime.evaluation_job import EvaluationJob
from dircluster.cluster.sweeps.store import key_of
from dircluster.config import RunConfig, with_values
from dircluster.presets import PRESETS, preset, run_to_plain
from dircluster.reproduction.exhibits import LABELS
from dircluster.reproduction.plan import Plan, make_plan, preset_of
from dircluster.reproduction.tables import exhibits
from dircluster.reproduction.transfer import transferred
from tests.conftest import Trained


def planned(storage: Path) -> tuple[Plan, RunConfig]:
    given = {"storage.uri": str(storage)}
    chosen = [exhibits("cifar10")[name] for name in ("table1", "fig6a")]
    plan = make_plan(chosen, "digits_smoke", given, (0,), ("identity", "dir"), key_of)
    return plan, with_values(preset("digits_smoke"), given)


def test_what_another_job_trained_is_found(trained: Trained) -> None:
    plan, config = planned(trained.folder / "runs")
    found = find_stored(plan, config).stages
    there = {
        training.name: [s for s, key in training.stages.items() if key in found] for training in plan.trainings.values()
    }
    assert there.pop("identity, seed 0") == ["target"]
    assert there.pop("dir, seed 0") == ["target", "pretrain", "dir"]
    assert set(map(tuple, there.values())) == {("target", "pretrain")}  # other alphas


def test_of_an_empty_folder_no_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("dircluster.cluster.reproducing.stored.load_data")
    plan, config = planned(tmp_path / "nothing")
    assert find_stored(plan, config) == Stored()


def test_what_other_code_judged_by_the_same_attacks_is_judged(trained: Trained, tmp_path: Path) -> None:
    storage = shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    given = {"storage.uri": str(storage)}
    plan = make_plan([exhibits("cifar10")["fig4"]], "digits_smoke", given, (0,), ("dir",), key_of)
    found = find_stored(plan, with_values(preset("digits_smoke"), given))
    there = [training.key for training in plan.trainings.values() if training.key in found.stages]
    assert len(there) == 1
    assert judged_units(plan, found) == set(there)  # no outcome of a reproduction is kept
    assert judged_units(plan, found, ["another"]) == {*there, "another"}
    for shard in storage.glob("evaluations/*/malt-*/*.json"):  # other tests may have judged it otherwise too
        shard.write_text(shard.read_text().replace('"code": "', '"code": "other'))
    assert judged_units(plan, found) == set()


def test_a_transfer_is_judged_once_its_own_shards_are_there(trained: Trained, tmp_path: Path) -> None:
    storage = shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    few = {"evaluation.images": 1, "evaluation.steps": 1, "evaluation.queries": 1, "evaluation.draws": 1}
    given = {"storage.uri": str(storage), **few, "evaluation.eot": 1}
    plan = make_plan([exhibits("cifar10")["table2"]], "digits_smoke", given, (0,), ("dir",), key_of)
    moved = next(iter(plan.transfers.values()))
    run = plan.run_of(moved)
    stages = find_stored(plan, run).stages
    purifier, target = stages[moved.purifier], next(storage.glob("target-*/final"))  # its own, as if it were another
    found = Stored({moved.purifier: purifier, moved.target: target}, find_stored(plan, run).data)
    assert moved.key not in judged_units(plan, found)
    folder = str(transferred(storage, purifier, target, "me", print, 1.0))
    assert moved.key not in judged_units(plan, found)
    job = EvaluationJob(JobSpec(run_to_plain(run), folder, str(tmp_path)), torch.device("cpu"))
    assert job.work_here(job.open_indices(), Terminal()) == 0
    assert moved.key in judged_units(plan, found)


@pytest.mark.parametrize("family", ["digits", "cifar10", "svhn", "digits_smoke"])
def test_all_systems_have_the_same_images(family: str) -> None:
    """One reading tells the fingerprint of all: they differ in what is done to training images alone."""
    own = {name: preset(name).data for name in (preset_of(family, system) for system in LABELS) if name in PRESETS}
    assert len(own) > 5
    decides = {(d.name, d.uri, d.limit, d.stream, d.resize, d.height, d.width, d.channels) for d in own.values()}
    assert len(decides) == 1
