"""What a step is timed by is the step of a run: its weights, its micro-batches, its optimizers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from dircluster.config import with_values
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.distributed.parallel import Parallel
from dircluster.models.precision import WholeConv2d
from dircluster.presets.dir import DirRun
from dircluster.training import profiling, stages
from dircluster.training.capture import WARM_UP
from dircluster.training.costs import step_operations
from dircluster.training.profiling import compare, stage_stepper, time_eot, time_phases, untimed
from dircluster.training.step import PHASES
from tests.conftest import ALONE

CPU = torch.device("cpu")


def test_a_timed_step_is_that_of_a_run(smoke: DirRun) -> None:
    """Its losses come from micro-batches, clipped gradients and a rate that warms up."""
    config = with_values(smoke, {"dir.optimizer.clip": 0.01, "dir.optimizer.warmup_epochs": 1, "dir.ema": 0.9})
    stage, train = stages.find_stage(config, "dir"), load(config.data, config.seed).train
    assert isinstance(train, Split)
    made = stage_stepper(stage, stage.recipe(stages.Networks(config, ALONE)), config, train, ALONE)
    losses = [made.step(step)[0]["loss"] for step in range(3)]
    found = time_phases(stage, stage.recipe(stages.Networks(config, ALONE)), train, config, ALONE, 2)
    assert (found["first_loss"], found["last_loss"]) == (losses[0], losses[-1])
    assert tuple(found["seconds"]) == PHASES
    assert found["seconds"]["attack"] > 0


def test_a_step_that_workers_share_is_held_against_the_rate_of_all(
    smoke: DirRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, train = stages.find_stage(smoke, "dir"), load(smoke.data, smoke.seed).train
    assert isinstance(train, Split)
    monkeypatch.setattr(profiling, "product_rate", lambda device, dtype: 5e9)
    monkeypatch.setattr(profiling, "stage_stepper", lambda *given: stage_stepper(*given[:-1], ALONE))
    recipe = stage.recipe(stages.Networks(smoke, ALONE))
    found = time_phases(stage, recipe, train, smoke, Parallel(0, 4, CPU), 1)
    assert found["matrix_product_gflop_per_second"] == 20
    (row,) = compare({"a": (stage, recipe, smoke)}, train, Parallel(0, 4, CPU), 1)
    share = step_operations(smoke, "dir") / row["seconds"] / 20e9
    assert row["share_of_matrix_product_rate"] == pytest.approx(share, rel=0.1, abs=1e-3)


def test_timed_steps_leave_no_thread_behind(smoke: DirRun) -> None:
    stage, train = stages.find_stage(smoke, "dir"), load(smoke.data, smoke.seed).train
    assert isinstance(train, Split)
    before = set(threading.enumerate())
    made = stage_stepper(stage, stage.recipe(stages.Networks(smoke, ALONE)), smoke, train, ALONE)
    made.batches.close()
    assert set(threading.enumerate()) <= before  # those of other tests may end meanwhile


def test_still_weights_are_twins_in_bf16_while_a_step_is_timed(smoke: DirRun) -> None:
    config = with_values(smoke, {"training.precision": "bf16"})
    stage, train = stages.find_stage(config, "dir"), load(config.data, config.seed).train
    assert isinstance(train, Split)
    networks = stages.Networks(config, ALONE)
    seen: set[torch.dtype] = set()
    for layer in networks["classifier"].modules():
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, WholeConv2d):
            layer.register_forward_pre_hook(lambda layer, inputs: seen.add(layer.weight.dtype))
    time_phases(stage, stage.recipe(networks), train, config, ALONE, 1)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("auto", torch.float32)])
def test_eot_is_timed_in_what_an_evaluation_crafts_in(smoke: DirRun, precision: Any, dtype: torch.dtype) -> None:
    networks = stages.Networks(smoke, ALONE)
    seen: set[torch.dtype] = set()
    for layer in networks["denoiser"].modules():
        if type(layer) is nn.Linear:
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    defense = networks.defense.defended(smoke, networks)
    found = time_eot(defense, torch.rand(2, 1, 8, 8), torch.arange(2), 3, precision, tries=1)
    assert found["batched"] > 0
    assert seen == {dtype}


def test_steps_that_choose_kernels_or_are_recorded_are_not_timed() -> None:
    assert untimed("auto", torch.device("cuda")) > WARM_UP
    assert [untimed("auto", CPU), untimed("bf16", CPU)] == [1, 3]
