"""Checkpoints that were damaged or made to harm: always noticed, never executed, the one before is used."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dircluster.config import ConfigError, with_values
from dircluster.presets import preset
from dircluster.training import checkpoint as ck
from dircluster.training.export import load_defense_folder
from dircluster.training.protocols import NoTracker, Quiet
from dircluster.training.run import Run
from tests.conftest import ALONE

WEIGHTS = {"model": {"w": torch.arange(500, dtype=torch.float32)}, "optimizer-x": {"w|momentum_buffer": torch.ones(50)}}


def two(folder: Path) -> ck.Checkpoints:
    """Two committed checkpoints of a stage, at steps 1 and 2."""
    made = ck.Checkpoints(folder, "key", lambda line: None)
    for step in (1, 2):
        made.save(step, WEIGHTS, {"step": step, "best": None})
    return made


def position(seed: int, folder: Path) -> tuple[Path, int, random.Random]:
    chance = random.Random(seed)
    file = chance.choice(sorted(f for f in folder.iterdir() if f.name != ck.COMMIT or seed % 2))
    return file, chance.randrange(len(file.read_bytes())), chance


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("how", ["flipped", "truncated"])  # test_checkpoint.py deletes each file
def test_damage_anywhere_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path, seed: int, how: str) -> None:
    checkpoints = two(tmp_path)
    newest = tmp_path / "step-00000002"
    file, at, chance = position(seed, newest)
    blob = bytearray(file.read_bytes())
    if how == "flipped":
        blob[at] ^= 1 << chance.randrange(8)
        file.write_bytes(bytes(blob))
    else:
        file.write_bytes(bytes(blob[:at]))
    found = checkpoints.latest()
    assert found is not None
    assert found.state["step"] == 1
    assert torch.equal(found.tensors["model"]["w"], WEIGHTS["model"]["w"])


@pytest.mark.parametrize("seed", range(5))
def test_damage_in_object_storage_is_noticed_too(bucket: Path, seed: int) -> None:
    checkpoints = two(bucket)
    file, at, chance = position(seed, bucket / "step-00000002")
    blob = bytearray(file.read_bytes())
    blob[at] ^= 1 << chance.randrange(8)
    file.write_bytes(bytes(blob))
    found = checkpoints.latest()
    assert found is not None
    assert found.state["step"] == 1


@pytest.mark.parametrize("name", ["COMMIT", "manifest.json", "state.json", "classifier.safetensors"])
def test_a_given_target_that_lies_in_storage_damaged_is_taken_again(name: str, tmp_path: Path) -> None:
    run = with_values(preset("digits_smoke"), {"storage.uri": str(tmp_path), "target.uri": "zoo:digits-at"})
    run = with_values(run, {"target.architecture": "small_cnn"})
    job = Run(run, ALONE, NoTracker(), Quiet())
    folder = Path(job._keep_given_target()[1])
    (folder / "final" / name).write_bytes(b"")
    assert not ck.is_sound(folder / "final")
    assert job._keep_given_target()[1] == str(folder)
    assert ck.is_sound(folder / "final")


def test_damaged_best_weights_cost_the_choice_and_not_the_stage(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = ck.Checkpoints(tmp_path, "key", said.append)
    checkpoints.save_at("best-00000001", {"model": WEIGHTS["model"]}, {})
    for step in (1, 2):
        checkpoints.save(step, WEIGHTS, {"step": step, "best": {"folder": "best-00000001"}})
    (tmp_path / "best-00000001" / "model.safetensors").write_bytes(b"")
    found = checkpoints.latest()
    assert found is not None
    assert (found.state["step"], found.state["best"]) == (2, None)
    assert "looking for a checkpoint with sound best weights" in said[0]


def test_what_is_written_after_a_fall_back_stays(tmp_path: Path) -> None:
    checkpoints = two(tmp_path)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    assert checkpoints.latest() is None
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    checkpoints.save(5, WEIGHTS, {"step": 5, "best": None})
    found = checkpoints.latest()
    assert found is not None
    assert found.state["step"] == 5


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def commit(folder: Path, files: dict[str, bytes], sizes: dict[str, Any] | None = None) -> None:
    """What an attacker would write: any files, with a manifest and a marker that fit them."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = {}
    for name, blob in files.items():
        if "/" not in name:
            (folder / name).write_bytes(blob)
        listed[name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()} | (sizes or {})
    manifest = json.dumps({"config": "key", "files": listed}).encode()
    (folder / ck.MANIFEST).write_bytes(manifest)
    (folder / ck.COMMIT).write_text(hashlib.sha256(manifest).hexdigest())


def pickled_weights(folder: Path, mark: Path) -> None:
    commit(folder, {"denoiser.safetensors": pickle.dumps(Bomb(mark)), "state.json": b"{}"})


def torch_archive(folder: Path, mark: Path) -> None:
    folder.mkdir(parents=True)
    torch.save({"w": Bomb(mark)}, folder / "x.pt")
    commit(folder, {"denoiser.safetensors": (folder / "x.pt").read_bytes(), "state.json": b"{}"})


def pickle_beside(folder: Path, mark: Path) -> None:
    commit(folder, {"optimizer.pkl": pickle.dumps(Bomb(mark)), "state.json": b"{}"})


def script_beside(folder: Path, mark: Path) -> None:
    commit(folder, {"sitecustomize.py": f"open({str(mark)!r}, 'w')".encode(), "state.json": b"{}"})


def traversal(folder: Path, mark: Path) -> None:
    (folder.parent / "outside.safetensors").write_bytes(save({"w": torch.ones(1)}))
    blob = (folder.parent / "outside.safetensors").read_bytes()
    commit(folder, {"../outside.safetensors": blob, "state.json": b"{}"})


def huge_header(folder: Path, mark: Path) -> None:
    commit(folder, {"denoiser.safetensors": struct.pack("<Q", 1 << 62) + b"{}", "state.json": b"{}"})


def huge_file(folder: Path, mark: Path) -> None:
    commit(folder, {"state.json": b"{}"})
    size = (1 << 36) + 1  # sparse: it takes no room on the disk, and would take all memory
    with (folder / "denoiser.safetensors").open("wb") as file:
        file.truncate(size)
    listed = {"denoiser.safetensors": {"bytes": size, "sha256": "0" * 64}}
    manifest = json.dumps({"config": "key", "files": listed}).encode()
    (folder / ck.MANIFEST).write_bytes(manifest)
    (folder / ck.COMMIT).write_text(hashlib.sha256(manifest).hexdigest())


def link_to_a_secret(folder: Path, mark: Path) -> None:
    secret = folder.parent / "secret.json"
    secret.write_text("{}")
    commit(folder, {"state.json": b"{}"})
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to(secret)


def deep_json(folder: Path, mark: Path) -> None:
    commit(folder, {"state.json": b"[" * 200_000 + b"]" * 200_000})


def foreign_code(folder: Path, mark: Path) -> None:
    (folder.parent / "planted.py").write_text(f"open({str(mark)!r}, 'w')\ndef make(**_): ...\n")
    facts = {"architecture": "planted:make", "model": {}, "masking": {}, "data": {}}
    commit(folder, {"state.json": json.dumps({"stage": "dir", "defense": facts}).encode()})


def best_elsewhere(folder: Path, mark: Path) -> None:
    shutil.copytree(_sound(folder.parent / "victim"), folder)
    commit(folder, {"state.json": json.dumps({"step": 1, "best": {"folder": "../../victim"}}).encode()})


def _sound(folder: Path) -> Path:
    ck.write(folder, WEIGHTS, {}, "key")
    return folder


@pytest.mark.parametrize(
    "make",
    [
        pickled_weights,
        torch_archive,
        pickle_beside,
        script_beside,
        traversal,
        huge_header,
        huge_file,
        link_to_a_secret,
        deep_json,
        foreign_code,
        best_elsewhere,
    ],
)
def test_a_malicious_checkpoint_is_refused_and_nothing_executed(
    tmp_path: Path, make: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))  # planted code could be found
    folder, mark = tmp_path / "step-00000001", tmp_path / "executed"
    make(folder, mark)
    said: list[str] = []
    assert ck.Checkpoints(tmp_path, "key", said.append).latest() is None or make in (foreign_code, best_elsewhere)
    with pytest.raises(ConfigError) as refusal:
        load_defense_folder(folder)
    for line in [*said, str(refusal.value)]:
        assert "\n" not in line
    assert not mark.exists()
