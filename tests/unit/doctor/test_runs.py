"""Stopped and resumed runs, steps of several kinds and their speed: sound ones pass, broken ones fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dircluster.config import ConfigError, with_values
from dircluster.defenses.base import Purifier
from dircluster.distributed.launch import WorkerError
from dircluster.distributed.parallel import Parallel
from dircluster.doctor import devices, rates, runs, speed
from dircluster.doctor.findings import Finding
from dircluster.doctor.machine import Machine, pictures, plain
from dircluster.presets import preset
from dircluster.training import stages, trainer


def failed(findings: Iterable[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.status == "fail"}


@pytest.mark.long
def test_a_resumed_run_that_forgets_its_optimizer_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "restore_optimizer", lambda *given: None)
    assert failed(runs.resumed(machine)) == {"resumed weights, apart"}


def compiled(machine: Machine, monkeypatch: pytest.MonkeyPatch, as_what: Any) -> list[Finding]:
    """The findings about steps where compiling a network is what ``as_what`` does to it."""
    monkeypatch.setattr(stages, "compile_blocks", as_what)
    training = dataclasses.replace(machine.config.training, compile="on")
    machine.config = dataclasses.replace(machine.config, training=training)
    return list(runs.steps(machine))


def test_compiled_steps_that_are_equal_pass(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled(machine, monkeypatch, lambda module: None)
    assert failed(found) == set()
    assert {finding.name for finding in found} >= {"losses of compiled steps, apart", "moves of compiled steps, apart"}


def test_compiled_steps_that_are_off_fail(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(module: nn.Module) -> None:
        if isinstance(module, Purifier):
            module.register_full_backward_pre_hook(lambda module, gradients: tuple(-one for one in gradients))

    assert failed(compiled(machine, monkeypatch, off)) >= {"moves of compiled steps, apart"}


def test_a_compiler_that_fails_is_a_failure_and_captured_steps_come_next(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(module: nn.Module) -> None:
        raise RuntimeError("fatal error: Python.h: No such file or directory")

    found = {finding.name: finding for finding in compiled(machine, monkeypatch, fails)}
    assert (found["compiled steps"].status, found["captured steps"].status) == ("fail", "skipped")
    assert found["compiled steps"].note == "RuntimeError: fatal error: Python.h: No such file or directory"


def test_steps_that_do_nothing_fail(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    assert failed(runs.steps(machine)) == {"plain steps move the weights"}


def test_what_is_left_out_has_a_reason(machine: Machine) -> None:
    reasons = [finding.note for finding in runs.steps(machine) if finding.status == "skipped"]
    assert reasons
    assert all(reasons)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take a second each; test_doctor times real ones."""
    monkeypatch.setattr(speed, "_timed", lambda *given: (1.0, 0.5, 2**30))


@pytest.mark.usefixtures("timed")
def test_a_slow_machine_is_a_warning(machine: Machine) -> None:
    machine.rates["fp32"] = 1e15  # whose products say that it could do far more
    assert {f.status for f in speed.stages(machine, 500) if f.name.endswith("batch 16")} == {"warn"}


@pytest.mark.usefixtures("timed")
def test_a_target_that_is_given_is_not_timed(machine: Machine) -> None:
    given = dataclasses.replace(machine, config=with_values(machine.config, {"target.uri": "zoo:digits-at"}))
    timed = [{finding.name.partition(",")[0] for finding in speed.stages(each, 500)} for each in (machine, given)]
    assert timed[0] - timed[1] == {"target"}


def test_what_would_take_too_long_is_skipped(machine: Machine) -> None:
    machine.rates["fp32"] = 1e4
    found = list(speed.stages(machine, 500))
    assert {finding.status for finding in found} == {"skipped"}
    assert found[0].note.startswith("would take about")


@pytest.mark.usefixtures("timed")
def test_out_of_memory_is_a_line(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = speed._timed

    def small(machine: Machine, stage: str, size: int, *given: int) -> Any:
        if size == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if stage == "pretrain":
            raise RuntimeError("no kernel image is available")
        return whole(machine, stage, size, *given)

    monkeypatch.setattr(speed, "_timed", small)
    found = {finding.name: finding for finding in speed.stages(machine, 500)}
    assert len(found) == 6
    assert found["dir, batch 16"].status == "warn"
    assert found["dir, batch 16"].note.startswith("out of memory: CUDA out of memory.")
    assert found["dir, batch 4"].status == "ok"
    assert found["pretrain, batch 4"].status == "fail"  # and what comes after it is looked at


def test_the_kernels_are_the_ten_longest(machine: Machine) -> None:
    figures = [finding.figure for finding in speed.kernels(machine)]
    assert len(figures) == 10
    assert figures == sorted(figures, reverse=True)  # type: ignore[type-var]


def test_a_card_slower_than_its_like_is_a_warning() -> None:
    known = {"copy": 3e12}
    assert rates._rate("copy", 2.9e12, "GB/s", known).status == "ok"
    assert rates._rate("copy", 1e12, "GB/s", known).status == "warn"
    assert rates._rate("copy", 1e12, "GB/s", {}).bound == ""


@pytest.mark.slow
def test_two_processes_train_as_one(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in devices.several(machine, 500)}
    assert failed(found.values()) == set()
    assert {"all-reduce", "losses by ddp, apart", "losses by fsdp, apart"} == set(found)
    group = {"bytes": 1, "bytes a second": 1, "ddp seconds": 1, "fsdp seconds": 1}
    true, seconds = devices.losses(plain(machine.config, batch_size=8, microbatch=None), "ddp", machine.parallel)
    assert seconds > 0
    group |= {"ddp": true, "fsdp": [1.01 * loss for loss in true]}
    monkeypatch.setattr(devices, "on_local_workers", lambda *given, within: group)
    assert failed(devices.several(machine, 500)) == {"losses by fsdp, apart"}


def test_a_stage_that_keeps_a_mean_of_its_weights_is_looked_at_under_both_strategies(
    machine: Machine, tmp_path: Path
) -> None:
    config = with_values(plain(machine.config, batch_size=8, microbatch=None), {"dir.ema": 0.9})
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for strategy in ("ddp", "fsdp"):  # it sees the first of two shares
            found, _ = devices.losses(config, strategy, Parallel(0, 2, torch.device("cpu")))
            assert len(found) == devices.STEPS
    finally:
        dist.destroy_process_group()


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a group needs, whatever this machine has."""
    monkeypatch.setattr(devices, "cores", lambda: 2)


@pytest.mark.usefixtures("two_cores")
def test_a_group_that_breaks_is_a_failure_and_one_that_refuses_is_skipped(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_by(error: Exception) -> None:
        def work(*given: Any, within: float) -> None:
            raise error

        monkeypatch.setattr(devices, "on_local_workers", work)

    end_by(ConfigError("which one worker makes"))
    (found,) = devices.several(machine, 500)
    assert (found.status, found.note) == ("skipped", "which one worker makes")
    end_by(WorkerError("a worker on this machine failed: RuntimeError: planted"))
    with pytest.raises(WorkerError, match="planted"):
        list(devices.several(machine, 500))


@pytest.mark.usefixtures("two_cores")
def test_a_group_that_is_slow_is_a_warning_where_nothing_can_hang(machine: Machine) -> None:
    (found,) = devices.several(machine, 0.1)
    assert (found.status, found.note) == ("warn", "2 processes were not done within 0 s")


def test_pictures_have_the_shape_and_classes_of_the_run() -> None:
    for name in ("digits", "cifar10", "imagenet_smoke"):
        data = preset(name).data
        split = pictures(data, 40)
        assert split.images.shape == (40, data.channels, data.height, data.width)
        assert sorted(set(split.labels.tolist())) == list(range(data.classes))
        assert split.images.float().std() > 20
