"""Blocks are compiled one by one: nothing is compiled again once every kind of pass has been made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dircluster.config import ConfigError, RunConfig, TrainingConfig
from dircluster.models.classifiers import BasicBlock
from dircluster.presets.dir import DirRun, ModelConfig
from dircluster.training import compiling
from dircluster.training.compiling import BLOCKS, check_compiler, compile_blocks
from dircluster.training.protocols import NoTracker, Quiet
from dircluster.training.run import Run
from dircluster.training.trainer import Trainer
from tests.conftest import ALONE
from tests.unit.training.conftest import make_trainer


def small_resnet(classes: int, channels: int) -> nn.Module:
    """The least network of residual blocks."""
    blocks = (BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), *blocks, *head)


@pytest.fixture
def run(smoke: DirRun) -> Iterator[DirRun]:
    """A run of networks that have blocks, as small as they can be, and no graph of an earlier test."""
    torch._dynamo.reset()
    yield dataclasses.replace(
        smoke,
        model=ModelConfig(patch=4, width=16, heads=1, encoder_depth=2, decoder_depth=1),
        target=dataclasses.replace(smoke.target, architecture=f"{__name__}:small_resnet", epochs=1),
        data=dataclasses.replace(smoke.data, limit=48),
        attack=dataclasses.replace(smoke.attack, steps=2),
        dir=dataclasses.replace(smoke.dir, perturb_steps=1),
        training=TrainingConfig(batch_size=16, select_images=16),
        evaluation=dataclasses.replace(smoke.evaluation, batch_size=16, images=8),
    )
    torch._dynamo.reset()


def compiled_trainer(run: RunConfig, folder: Path, backend: Any) -> Trainer:
    made = make_trainer(run, folder)
    for network in made.recipe.children():
        compile_blocks(network, backend)
    return made


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_after_the_first_step_and_validation_nothing_is_compiled_again(
    run: DirRun, tmp_path: Path, backend: str
) -> None:
    plain, made = make_trainer(run, tmp_path), compiled_trainer(run, tmp_path, backend)
    found = [made.step(0)[0]]
    made._judge(1)
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(made.step(1)[0])
        made._judge(2)
    for step, terms in enumerate(found):
        for name, value in plain.step(step)[0].items():
            assert terms[name] == pytest.approx(value, rel=2e-3), (step, name)


@pytest.mark.long
def test_twins_in_bf16_are_graphs_of_their_own_that_are_made_once(run: DirRun, tmp_path: Path) -> None:
    half = dataclasses.replace(run, training=dataclasses.replace(run.training, precision="bf16"))
    made = compiled_trainer(half, tmp_path, "eager")
    made.step(0)
    made._judge(1)
    with torch.compiler.set_stance("fail_on_recompile"):
        made.step(1)
        made._judge(2)


def test_a_new_shape_is_noticed(run: DirRun, tmp_path: Path) -> None:
    """What the test above trusts in: another batch size would be another graph."""
    made = compiled_trainer(run, tmp_path, "eager")
    made.step(0)
    made.config = dataclasses.replace(run, training=dataclasses.replace(run.training, microbatch=8))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        made.step(1)


def test_hooks_and_names_stay_on_modules_that_are_not_compiled(run: DirRun, tmp_path: Path) -> None:
    made = compiled_trainer(run, tmp_path, "eager")
    assert set(made.recipe.state_dict()) == set(make_trainer(run, tmp_path).recipe.state_dict())
    compiled = [part for part in made.recipe.modules() if part._compiled_call_impl is not None]
    assert len(compiled) == 5
    assert all(isinstance(part, BLOCKS) for part in compiled)
    assert made.watched not in compiled


@pytest.mark.long
def test_an_evaluation_and_what_is_asked_first_run_uncompiled(run: DirRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their batches have many sizes."""
    asked, graphs, before, sizes = [], 0, 0, set()

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        sizes.update(len(each) for each in inputs if each.ndim > 2)
        return graph.forward

    class Counts(Quiet):
        def say(self, line: str) -> None:
            nonlocal before
            before = graphs if line.startswith("evaluation: suite") else before

    monkeypatch.setattr("dircluster.training.stages.compile_blocks", lambda network: compile_blocks(network, backend))
    monkeypatch.setattr("dircluster.training.switches.check_compiler", asked.append)
    config = dataclasses.replace(run, training=dataclasses.replace(run.training, compile="on"))
    config = dataclasses.replace(config, pretrain=dataclasses.replace(run.pretrain, epochs=0))
    outcome = Run(config, ALONE, NoTracker(), Counts()).execute()
    assert asked == [torch.device("cpu")]
    assert len(outcome["results"]) == 10
    assert 0 < before == graphs
    assert 16 in sizes
    assert not sizes & {1, 2}, "of the images by which a target is asked whether it can be trained"


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(torch.device("cpu"))
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(ConfigError, match=r"training.compile needs a C\+\+ compiler"):
        compiling.check_compiler(torch.device("cpu"))


@pytest.mark.parametrize(
    ("triton", "compiler", "headers", "lacks"),
    [
        (True, "gcc", True, ""),
        (True, "clang", True, ""),
        (False, "gcc", True, "Triton on a GPU"),
        (True, "", True, "a C compiler on a GPU"),
        (True, "gcc", False, "Python's headers on a GPU"),
    ],
)
def test_triton_needs_what_it_builds_with(
    triton: bool, compiler: str, headers: bool, lacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: triton)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name, scheme: str(tmp_path))
    for name in filter(None, [compiler, "Python.h" if headers else ""]):
        (tmp_path / name).touch(mode=0o755)
    with pytest.raises(ConfigError, match=f"training.compile needs {lacks}.*compile off") if lacks else nullcontext():
        compiling.check_compiler(torch.device("cuda"))
