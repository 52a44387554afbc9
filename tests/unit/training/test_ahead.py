"""Batches made a step ahead on a thread are those made in place, to the bit, and the thread ends with the run."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dircluster.config import TrainingConfig
from dircluster.data.loader import Loader
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.defenses.recipe import Batch
from dircluster.presets.dir import DirRun
from dircluster.training.ahead import Batches, is_ahead
from dircluster.training.interrupt import Interrupted
from dircluster.training.trainer import Trainer
from tests.unit.training.conftest import StopAfter, elsewhere, make_trainer, run, weights

CPU = torch.device("cpu")


def asked(smoke: DirRun, switch: Any, **training: Any) -> DirRun:
    return dataclasses.replace(smoke, training=dataclasses.replace(smoke.training, draws_ahead=switch, **training))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


def tensors(batches: list[Batch]) -> list[Tensor]:
    return [t for batch in batches for t in (batch.images, batch.labels, *batch.draws.values())]


def test_a_gpu_makes_batches_ahead_by_itself() -> None:
    auto = TrainingConfig()
    assert [is_ahead(auto, torch.device(kind)) for kind in ("cpu", "cuda")] == [False, True]
    assert is_ahead(dataclasses.replace(auto, draws_ahead="on"), CPU)
    assert not is_ahead(dataclasses.replace(auto, draws_ahead="off"), torch.device("cuda"))


@pytest.mark.parametrize("microbatch", [None, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_the_same_for_every_worker_in_micro_batches_and_over_the_end_of_an_epoch(
    smoke: DirRun, tmp_path: Path, rank: int, microbatch: int | None
) -> None:
    made: dict[str, Trainer] = {}
    for switch in ("off", "on"):
        trainer = make_trainer(asked(smoke, switch, microbatch=microbatch), tmp_path)
        train = load(smoke.data, smoke.seed).train
        assert isinstance(train, Split)
        share = {"rank": rank, "world": 2, "crop_padding": 1, "flip": True}
        trainer.loader = Loader(train, smoke.training.batch_size, smoke.seed, "dir", **share)  # type: ignore[arg-type]
        made[switch] = trainer
    epoch = made["on"].loader.steps_per_epoch
    # In order; again from the middle, as a run that was resumed; and the last step, after which there is none.
    for step in [*range(epoch + 2), 1, 2, made["on"].steps - 1]:
        here, there = (tensors(made[switch].batches(step)) for switch in ("off", "on"))
        assert len(here) == len(there) > 3
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True)), step
    assert made["on"].batches._next is None
    made["on"].batches.close()
    assert not threads()


@pytest.mark.long
def test_a_run_that_draws_ahead_ends_in_the_same_bits_also_when_it_is_resumed(smoke: DirRun, tmp_path: Path) -> None:
    whole = run(elsewhere(smoke, tmp_path / "whole"))
    broken, stops = asked(elsewhere(smoke, tmp_path / "broken"), "on"), 0
    while True:
        try:
            outcome = run(broken, StopAfter(7))
            break
        except Interrupted:
            stops += 1
            assert not threads()
    assert stops > 1
    assert not threads()
    assert weights(outcome) == weights(whole)
    assert outcome["checkpoint"].rpartition("/broken/")[2] == whole["checkpoint"].rpartition("/whole/")[2]


def test_the_next_batch_is_made_while_this_step_runs_and_on_another_thread() -> None:
    made: list[tuple[int, str]] = []
    second = threading.Event()

    def make(step: int) -> list[Batch]:
        made.append((step, threading.current_thread().name))
        if step == 1:
            second.set()
        return []

    batches = Batches(make, 3, CPU, ahead=True)
    batches(0)
    assert second.wait(60)
    batches.settle()
    assert made == [(0, "batches_0"), (1, "batches_0")]
    batches.close()
    batches(2)
    assert made[2:] == [(2, "MainThread")]


def test_an_error_of_the_thread_comes_out_at_its_step(smoke: DirRun, tmp_path: Path) -> None:
    trainer = make_trainer(asked(smoke, "on"), tmp_path)
    sound = trainer.loader

    def broken(epoch: int, step: int) -> Any:
        if step == 2:
            raise OSError("the shard is gone")
        return sound(epoch, step)

    broken.steps_per_epoch = sound.steps_per_epoch  # type: ignore[attr-defined]
    made, inner, trainer.loader = [], trainer._step, broken  # type: ignore[var-annotated,assignment]

    def step(number: int) -> Any:
        found = inner(number)
        made.append(number)
        return found

    trainer._step = step  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the shard is gone"):
        trainer.run()
    assert made == [0, 1]
    assert not threads()
