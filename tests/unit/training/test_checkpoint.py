"""Checkpoints are whole or absent; what is damaged is passed over; nothing that is read can execute."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dircluster.training import checkpoint as ck

TENSORS = {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}, "optimizer": {}}
STATE = {"step": 7, "best": None}


def store(tmp_path: Path, lines: list[str] | None = None) -> ck.Checkpoints:
    return ck.Checkpoints(tmp_path, "key", (lines if lines is not None else []).append)


def test_a_round_trip(tmp_path: Path) -> None:
    sha = ck.write(tmp_path / "c", TENSORS, STATE, "key")
    found = ck.read(tmp_path / "c", "key")
    assert found.state == STATE
    assert torch.equal(found.tensors["model"]["a"], TENSORS["model"]["a"])
    assert found.tensors["optimizer"] == {}
    assert ck.digest(tmp_path / "c") == sha


def test_weights_that_share_memory_are_stored_by_each_name(tmp_path: Path) -> None:
    one, line = torch.nn.Linear(3, 3), torch.arange(10.0)
    state = torch.nn.Sequential(one, torch.nn.ReLU(), one).state_dict()
    state |= {"first": line[:6], "last": line[4:], "column": torch.rand(4, 3)[:, 1], "turned": torch.rand(2, 3).t()}
    state["conjugate"] = torch.tensor([1 + 2j, 3 - 1j]).conj()
    ck.write(tmp_path / "a", {"classifier": state}, {}, "key")
    found = ck.read(tmp_path / "a", "key").tensors["classifier"]
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    ck.write(tmp_path / "c", TENSORS, STATE, "key")
    names = sorted(f.name for f in (tmp_path / "c").iterdir())
    assert names == ["COMMIT", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_without_the_marker_there_is_nothing(tmp_path: Path) -> None:
    ck.write(tmp_path / "c", TENSORS, STATE, "key")
    (tmp_path / "c" / ck.COMMIT).unlink()
    with pytest.raises(ck.CheckpointError, match="holds no committed checkpoint"):
        ck.read(tmp_path / "c")


def test_another_config_is_refused(tmp_path: Path) -> None:
    store(tmp_path).save(1, TENSORS, STATE)
    with pytest.raises(ck.CheckpointError, match="belongs to another config"):
        ck.Checkpoints(tmp_path, "other").latest()


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json", "COMMIT"])
@pytest.mark.parametrize("damage", ["truncate", "grow", "flip", "delete"])
def test_a_damaged_newest_one_is_passed_over_with_one_line(tmp_path: Path, file: str, damage: str) -> None:
    lines: list[str] = []
    checkpoints = store(tmp_path, lines)
    checkpoints.save(1, TENSORS, {**STATE, "step": 1})
    checkpoints.save(2, TENSORS, {**STATE, "step": 2})
    victim = tmp_path / "step-00000002" / file
    blob = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "grow":
        victim.write_bytes(blob + bytes(64))
    else:
        middle = len(blob) // 2
        blob[middle] ^= 1
        victim.write_bytes(blob[:middle] if damage == "truncate" else blob)
    found = checkpoints.latest()
    assert found is not None
    assert found.state["step"] == 1
    if (file, damage) != ("COMMIT", "delete"):  # then it was never committed
        assert len(lines) == 1
        assert "falling back" in lines[0]
        assert "\n" not in lines[0]
    checkpoints.save(3, TENSORS, {**STATE, "step": 3})


def test_a_missing_best_makes_its_checkpoint_useless(tmp_path: Path) -> None:
    lines: list[str] = []
    checkpoints = store(tmp_path, lines)
    checkpoints.save_at("best-1", TENSORS, {})
    checkpoints.save(1, TENSORS, {"step": 1, "best": {"folder": "best-1"}})
    checkpoints.save_at("best-2", TENSORS, {})
    checkpoints.save(2, TENSORS, {"step": 2, "best": {"folder": "best-2"}})
    (tmp_path / "best-2" / "model.safetensors").unlink()
    found = checkpoints.latest()
    assert found is not None
    assert found.state["step"] == 1


def test_two_steps_and_the_best_they_name_are_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for step in range(1, 6):
        if step in (1, 3):
            checkpoints.save_at(f"best-{step}", TENSORS, {})
        checkpoints.save(step, TENSORS, {"step": step, "best": {"folder": f"best-{1 if step < 3 else 3}"}})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best-3", "step-00000004", "step-00000005"]


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ck.CheckpointError, match=r"storage.uri: cannot write"):
        ck.write(tmp_path / "file" / "c", TENSORS, STATE, "key")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", ".hidden", "a/b.json"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "c"
    ck.write(folder, TENSORS, STATE, "key")
    _forge(folder, name, b"x")
    with pytest.raises(ck.CheckpointError, match="no file of tensors or state"):
        ck.read(folder)


def test_a_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "c"
    ck.write(folder, TENSORS, STATE, "key")
    payload = pickle.dumps(Bomb())
    (folder / "model.safetensors").write_bytes(payload)
    _forge(folder, "model.safetensors", payload)
    with pytest.raises(ck.CheckpointError, match="cannot be parsed"):
        ck.read(folder)
    assert not (tmp_path / "executed").exists()


def test_a_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    ck.write(folder, TENSORS, STATE, "key")
    original = tmp_path / "elsewhere"
    (folder / "state.json").rename(original)
    (folder / "state.json").symlink_to(original)
    with pytest.raises(ck.CheckpointError, match="is a link"):
        ck.read(folder)


def _forge(folder: Path, name: str, blob: bytes) -> None:
    """An attacker who may write the folder can commit what he likes."""
    import hashlib

    manifest = json.loads((folder / ck.MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    text = json.dumps(manifest).encode()
    (folder / ck.MANIFEST).write_bytes(text)
    (folder / ck.COMMIT).write_text(hashlib.sha256(text).hexdigest())


def test_the_marker_is_written_last_and_is_gone_before_a_byte_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "c", list[tuple[str, bool]]()
    ck.write(folder, TENSORS, STATE, "key")

    def spied(call: Any) -> Any:
        def write(file: Path, data: Any) -> Any:
            seen.append((file.name, (folder / ck.COMMIT).exists()))
            return call(file, data)

        return write

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, spied(getattr(Path, name)))
    ck.write(folder, TENSORS, STATE, "key")
    assert [name for name, _ in seen[-2:]] == [ck.MANIFEST, ck.COMMIT]
    assert len(seen) == 5
    assert not any(committed for _, committed in seen)
