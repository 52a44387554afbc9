"""A purifier in front of another target: written once, and again where what lies there is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dircluster.reproduction.transfer import transfer_folder, transferred
from dircluster.training import checkpoint
from dircluster.training.locks import TakenOverError, stage_lock


def made(folder: Path) -> tuple[Path, Path]:
    """Two finished defenses."""
    for name, value in (("purifier", 1.0), ("target", 2.0)):
        tensors = {part: {"weight": torch.full((2,), value)} for part in ("denoiser", "classifier")}
        checkpoint.write(folder / name / "final", tensors, {"defense": {"name": name}}, name)
    return folder / "purifier" / "final", folder / "target" / "final"


def test_one_is_of_the_purifier_and_of_the_others_target(tmp_path: Path) -> None:
    found = checkpoint.read(transferred(tmp_path, *made(tmp_path), "me", print, 1.0))
    assert found.state["defense"] == {"name": "purifier"}
    assert {name: group["weight"].tolist() for name, group in found.tensors.items()} == {
        "denoiser": [1.0, 1.0],
        "classifier": [2.0, 2.0],
    }


def test_one_that_is_damaged_is_written_again(tmp_path: Path) -> None:
    both = made(tmp_path)
    folder = transferred(tmp_path, *both, "me", print, 1.0)
    file = folder / "denoiser.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert transferred(tmp_path, *both, "me", print, 1.0) == folder
    assert file.read_bytes() == whole


def test_one_that_another_job_writes_is_left_to_it(tmp_path: Path) -> None:
    both = made(tmp_path)
    place = transfer_folder(tmp_path, *both).folder
    with stage_lock(place, "another", print), pytest.raises(TakenOverError):
        transferred(tmp_path, *both, "me", print, 0.0)
    assert checkpoint.digest(place / "final") is None
