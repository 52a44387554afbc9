"""The finished defense from its folder, and targets given from outside."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dircluster
from dircluster.config import ConfigError, RunConfig
from dircluster.defenses.table import find_defense
from dircluster.distributed.parallel import Parallel
from dircluster.training.protocols import NoTracker, Quiet
from dircluster.training.run import Run

ALONE = Parallel(0, 1, torch.device("cpu"))


def run(config: RunConfig) -> dict[str, Any]:
    return Run(config, ALONE, NoTracker(), Quiet()).execute()


def given(config: RunConfig, uri: object, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, target=dataclasses.replace(config.target, uri=str(uri), **changes))


@pytest.mark.long
def test_a_finished_defense_loads_and_classifies(smoke: RunConfig) -> None:
    folder = Path(run(smoke)["checkpoint"])
    defense = dircluster.load_defense(folder)
    assert not defense.training
    images = torch.rand(3, 1, 8, 8)
    assert defense(images).shape == (3, 10)
    assert torch.equal(defense.fixed(1)(images), dircluster.load_defense(str(folder)).fixed(1)(images))
    with pytest.raises(ConfigError, match="holds no finished defense"):
        dircluster.load_defense(next(folder.parents[1].glob("target-*")) / "final")
    with pytest.raises(ConfigError, match="holds no committed checkpoint"):
        dircluster.load_defense(folder.parent)


@pytest.mark.long
def test_given_targets(smoke: RunConfig, tmp_path: Path) -> None:
    classifier = find_defense("dir").build(dataclasses.replace(smoke, seed=5), "classifier")
    save_file(classifier.state_dict(), tmp_path / "whole.safetensors")
    save_file(classifier.network.state_dict(), tmp_path / "bare.safetensors")
    outcomes = [run(given(smoke, tmp_path / f"{name}.safetensors")) for name in ("whole", "bare")]
    assert outcomes[0]["checkpoint"] == outcomes[1]["checkpoint"]  # the same weights are the same target
    loaded = dircluster.load_defense(outcomes[0]["checkpoint"]).classifier
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), classifier.parameters(), strict=True))
    assert run(given(smoke, outcomes[0]["checkpoint"]))["checkpoint"] == outcomes[0]["checkpoint"]


def test_targets_that_do_not_fit_are_one_line(smoke: RunConfig, tmp_path: Path) -> None:
    seven = dataclasses.replace(smoke, data=dataclasses.replace(smoke.data, classes=7))
    save_file(find_defense("dir").build(seven, "classifier").state_dict(), tmp_path / "seven.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "seven.safetensors").read_bytes()[:-100])
    for name, message in {
        "seven": r"'network.7.bias' is \(7,\), not \(10,\); check data.classes",
        "foreign": "is missing",
        "cut": "is not a sound safetensors file",
        "nowhere": "does not exist",
    }.items():
        with pytest.raises(ConfigError, match=message) as refusal:
            run(given(smoke, tmp_path / f"{name}.safetensors"))
        assert "\n" not in str(refusal.value)


def test_code_stored_with_older_models_still_finds_its_loader() -> None:
    from dircluster.training import bundle, export

    assert bundle.load_defense_folder is export.load_defense_folder
