"""The defenses that come with this package: the table is true, they load by name, what is damaged is refused."""

from __future__ import annotations

import json
import shutil
import time
from enum import Enum
from pathlib import Path

import pytest
import torch

import dircluster
from dircluster import zoo
from dircluster.cluster import preflight
from dircluster.cluster.commands import evaluate
from dircluster.config import ConfigError
from dircluster.evaluation.claims import read_claim
from dircluster.presets import preset
from dircluster.training import checkpoint
from dircluster.training.export import load_target
from tests.unit.training.test_export import given

SMALL = "zoo:digits-dir"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small defense, free to be changed."""
    folder = tmp_path / zoo.find(SMALL).folder
    shutil.copytree(zoo.folder_of(SMALL), folder)
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    return folder


@pytest.mark.parametrize("name", zoo.ZOO)
def test_each_has_its_weights_its_card_and_its_claim(name: str, root: Path) -> None:
    uri = f"zoo:{name}"
    folder, file = zoo.folder_of(uri), zoo.claim_of(uri)
    assert checkpoint.digest(folder) == zoo.find(uri).sha256
    assert f"zoo:{name}" in (folder / "README.md").read_text()
    assert file.read_bytes() == (root / "docs" / "claims" / f"{name}.json").read_bytes()
    claim = read_claim(file)
    bare = claim.facts["settings"]["run"]["target"].get("uri") == uri and claim.plain["defense"] == "none"
    assert bare if zoo.find(uri).bare else claim.facts["defense"] == uri


def test_the_zoo_is_small(root: Path) -> None:
    assert sum(file.stat().st_size for file in (root / "dircluster" / "zoo").rglob("*")) < 60e6


def test_it_loads_by_name() -> None:
    began = time.process_time()
    defense = dircluster.load_defense(SMALL)
    assert time.process_time() - began < 2
    target = dircluster.load_defense("zoo:digits-at")
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(target(images), defense.classifier(images))
    assert not torch.equal(defense.fixed(1)(images), target(images))
    assert not defense.training
    assert not target.training
    assert target.image_shape == defense.image_shape == (1, 8, 8)
    for dataset, threat in (("digits", "linf"), (Enum("Set", {"digits": "digits"}).digits, Enum("T", {"a": "Linf"}).a)):
        by_signature = dircluster.load_model("at", dataset, threat)  # type: ignore[arg-type]
        assert torch.equal(by_signature(images), target(images))


def test_its_target_is_one_to_defend() -> None:
    run = given(preset("digits"), "zoo:digits-at")
    images = torch.rand(3, 1, 8, 8)
    found, wanted = load_target(run).eval()(images), dircluster.load_defense(SMALL).classifier(images)
    assert torch.equal(found, wanted)


def test_an_unknown_name_is_one_line_that_lists_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()  # somebody's other MLflow: not ours to ask
    there = "there is no zoo:nothing; there are zoo:"
    with pytest.raises(ConfigError, match=there):
        dircluster.load_defense("zoo:nothing")
    assert evaluate.main(["digits", "--defense", "zoo:nothing"]) == 2
    assert evaluate.main(["digits", "--defense", "none", "--target.uri", "zoo:nothing"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(there in line and SMALL in line for line in lines)
    with pytest.raises(ConfigError, match=there):  # before a run or a sweep starts anything
        preflight.check_target(given(preset("digits"), "zoo:nothing"), away=False)
    with pytest.raises(ConfigError, match="there is no model 'none' for digits"):
        dircluster.load_model("none", "digits")
    assert [file.name for file in tmp_path.iterdir()] == ["mlruns"]  # asking made no record
    with pytest.raises(ConfigError, match=r"there is no record .*absent\.db"):
        dircluster.load_model("none", "digits", tracking_uri=f"sqlite:///{tmp_path / 'absent.db'}")
    (tmp_path / "other.db").write_text("no database at all")
    for asked in (
        lambda uri: dircluster.load_model("none", "digits", tracking_uri=uri),
        lambda uri: dircluster.load_defense("models:/none@champion", tracking_uri=uri),
    ):
        with pytest.raises(ConfigError, match=r"^.*: .*file is not a database.*$") as refusal:
            asked(f"sqlite:///{tmp_path / 'other.db'}")
        assert "\n" not in str(refusal.value)


def test_what_is_damaged_is_refused(copied: Path) -> None:
    weights = copied / "classifier.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"classifier\.safetensors is not what was written"):
        dircluster.load_defense(SMALL)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"classifier\.safetensors cannot be read"):
        load_target(given(preset("digits"), SMALL))


def test_another_defense_in_its_place_is_refused(copied: Path) -> None:
    found = checkpoint.read(copied)
    checkpoint.write(copied, found.tensors, json.loads(json.dumps(found.state)) | {"made": {}}, "zoo")
    with pytest.raises(ConfigError, match="is not the one that came with this package"):
        dircluster.load_defense(SMALL)


def test_a_copy_without_weights_says_so(copied: Path) -> None:
    shutil.rmtree(copied)
    with pytest.raises(ConfigError, match="are not in this copy of the package"):
        dircluster.load_defense(SMALL)
