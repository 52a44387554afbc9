"""Checkpoints off the training thread: in order, tried again, the newest first where storage refuses."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from dircluster.config import StoppedError
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.checkpoint_writer import CheckpointWriter, Save
from tests.conftest import wait_until

WEIGHTS = {"w": torch.arange(4.0)}


def save(step: int, best: str | None = None, new: bool = True) -> Save:
    """A save whose state names its best weights, which come with it where they are ``new``."""
    state = {"step": step, "best": None if best is None else {"folder": best}}
    return Save(step, {"model": WEIGHTS}, state, (best, WEIGHTS, {"step": step}) if best and new else None)


class Refusal:
    """A guard that refuses until it is told otherwise."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked = 0

    def __call__(self) -> None:
        self.asked += 1
        if not self.open.is_set():
            raise OSError(28, "No space left on device")


def test_saves_are_committed_in_order_and_the_newest_two_stay(tmp_path: Path) -> None:
    writer = CheckpointWriter(Checkpoints(tmp_path, "k"), print)
    for step in range(1, 6):
        writer.put(save(step, f"best-{step:08d}" if step % 2 else None))
    writer.close(120)
    assert {f.name for f in tmp_path.glob("step-*")} == {"step-00000004", "step-00000005"}
    assert writer.step == 5
    found = Checkpoints(tmp_path, "k").latest()
    assert found is not None
    assert found.state["step"] == 5


def test_while_storage_refuses_training_goes_on_and_the_newest_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dircluster.training.retry.LONGEST_WAIT", 60)
    lines: list[str] = []
    refusal = Refusal()
    writer = CheckpointWriter(Checkpoints(tmp_path, "k", guard=refusal), lines.append)
    began = time.monotonic()
    writer.put(save(1, "best-00000001"))
    wait_until(lambda: refusal.asked)
    for step in range(2, 50):
        writer.put(save(step, "best-00000001", new=False))
    assert time.monotonic() - began < 30
    refusal.open.set()
    writer.close(120)
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-00000049"]
    assert (tmp_path / "best-00000001" / "COMMIT").exists()  # the best of one that was passed over
    assert len(lines) == 2
    assert "checkpoint 1 cannot be stored ([Errno 28] No space left on device); training goes on" in lines[0]
    assert "storage takes checkpoints again" in lines[1]


def test_patience_ends_with_an_error_and_what_was_stored_stays(tmp_path: Path) -> None:
    refusal = Refusal()
    refusal.open.set()
    writer = CheckpointWriter(Checkpoints(tmp_path, "k", guard=refusal), lambda line: None)
    writer.put(save(1))
    wait_until(lambda: writer.step == 1)
    refusal.open.clear()
    writer.put(save(2))
    wait_until(lambda: refusal.asked > 1)
    message = r"took no checkpoint for 1 s .*No space left.*committed before stays"
    with pytest.raises(StoppedError, match=message) as stopped:
        writer.close(1)
    assert stopped.value.exit_code == 1
    assert [f.name for f in tmp_path.glob("step-*")] == ["step-00000001"]


def test_best_weights_are_committed_before_the_state_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, done = Checkpoints(tmp_path, "k"), list[str]()
    monkeypatch.setattr(checkpoints, "save", lambda step, *_: done.append(f"step {step}"))
    monkeypatch.setattr(checkpoints, "save_at", lambda name, *_: done.append(name))
    writer = CheckpointWriter(checkpoints, print)
    writer.put(save(3, "best-00000003"))
    writer.close(120)
    assert done == ["best-00000003", "step 3"]
