"""Optimizers: which kind a device gets, and that each goes on from its stored state as if it had never stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dircluster import rng
from dircluster.config import ConfigError, OptimizerConfig, TrainingConfig
from dircluster.presets.dir import DirRun
from dircluster.training.checkpoint import read, write
from dircluster.training.optim import is_fused, make_optimizer, optimizer_tensors, restore_optimizer

KNOBS = {name: OptimizerConfig(name=name, lr=0.05) for name in ("sgd", "adam", "adamw")}


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)]


def train(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters.values(), gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()


def fresh() -> dict[str, Tensor]:
    return {"a": torch.ones(3, 4, requires_grad=True), "b": torch.ones(4, requires_grad=True)}


def test_a_gpu_gets_fused_optimizers_by_itself_and_a_cpu_where_asked() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    auto = TrainingConfig()
    for knobs in KNOBS.values():
        assert (is_fused(auto, cpu, knobs, False), is_fused(auto, gpu, knobs, False)) == (False, True)
        assert is_fused(dataclasses.replace(auto, fused="on"), cpu, knobs, False)
        assert not is_fused(dataclasses.replace(auto, fused="off"), gpu, knobs, False)
        assert make_optimizer([*fresh().values()], knobs, fused=True).defaults["fused"]
        assert not make_optimizer([*fresh().values()], knobs).defaults["fused"]  # bits of CPUs are those of before


@pytest.mark.parametrize("name", KNOBS)
def test_weights_that_lie_in_shards_are_updated_as_on_a_gpu(name: str, tmp_path: Path) -> None:
    """By one kernel, but for SGD's, which PyTorch has no rule for there."""
    gpu, on = torch.device("cuda"), dataclasses.replace(TrainingConfig(), fused="on")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        layer, plain = (nn.Linear(3, 2) for _ in range(2))
        plain.load_state_dict(layer.state_dict())
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        fused = is_fused(TrainingConfig(), gpu, KNOBS[name], True)
        for module, kind in ((layer, fused), (plain, False)):
            optimizer = make_optimizer([*module.parameters()], KNOBS[name], kind)
            for step in range(3):
                module(torch.full((4, 3), step + 1.0)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        for weight, expected in zip(layer.parameters(), plain.parameters(), strict=True):
            assert isinstance(weight, DTensor)
            torch.testing.assert_close(weight.full_tensor(), expected)
    finally:
        dist.destroy_process_group()
    if name == "sgd":
        assert not fused
        with pytest.raises(ConfigError, match=r"^training.fused must be auto or off for SGD with parallel.strategy"):
            is_fused(on, gpu, KNOBS[name], True)
    else:
        assert fused
        assert is_fused(on, gpu, KNOBS[name], True)


def test_adams_decay_is_a_penalty() -> None:
    """It enters the moments, as the gradient of half the decay times the squared weights does."""
    decayed, penalized = fresh(), fresh()
    knobs = OptimizerConfig(name="adam", lr=0.05, weight_decay=0.1)
    one = make_optimizer([*decayed.values()], knobs)
    two = make_optimizer([*penalized.values()], dataclasses.replace(knobs, weight_decay=0.0))
    for step in range(3):
        train(decayed, one, range(step, step + 1))
        for parameter, gradient in zip(penalized.values(), gradients(step), strict=True):
            parameter.grad = gradient + 0.1 * parameter.detach()
        two.step()
    for name, parameter in decayed.items():
        torch.testing.assert_close(parameter, penalized[name])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", KNOBS)
def test_resumed_and_uninterrupted_end_in_the_same_bits(name: str, fused: bool, tmp_path: Path) -> None:
    whole = fresh()
    train(whole, make_optimizer([*whole.values()], KNOBS[name], fused), range(6))

    begun = fresh()
    optimizer = make_optimizer([*begun.values()], KNOBS[name], fused)
    train(begun, optimizer, range(3))
    write(tmp_path / "c", {"o": optimizer_tensors(optimizer, {p: n for n, p in begun.items()})}, {}, "key")
    resumed = {n: p.detach().clone().requires_grad_(True) for n, p in begun.items()}
    again = make_optimizer([*resumed.values()], KNOBS[name], fused)
    restore_optimizer(again, resumed, read(tmp_path / "c").tensors["o"])
    train(resumed, again, range(3, 6))
    for n, value in whole.items():
        assert torch.equal(value, resumed[n])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", KNOBS)
def test_a_state_lies_in_memory_as_its_weight_does(name: str, fused: bool, tmp_path: Path) -> None:
    """Fused kernels take both number by number, and files hold them row by row: a GPU's target has channels last."""

    def trained(weight: Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            weight.grad = torch.empty_like(weight).copy_(torch.randn(4, 3, 2, 2, generator=rng.generator(0, "g", step)))
            optimizer.step()

    def weight(values: Tensor) -> Tensor:
        return values.clone().to(memory_format=torch.channels_last).requires_grad_(True)

    whole, begun = (weight(torch.ones(4, 3, 2, 2)) for _ in range(2))
    trained(whole, make_optimizer([whole], KNOBS[name], fused), range(4))
    optimizer = make_optimizer([begun], KNOBS[name], fused)
    trained(begun, optimizer, range(2))
    write(tmp_path / "c", {"o": optimizer_tensors(optimizer, {begun: "a"})}, {}, "key")
    resumed = weight(begun.detach())
    again = make_optimizer([resumed], KNOBS[name], fused)
    restore_optimizer(again, {"a": resumed}, read(tmp_path / "c").tensors["o"])
    trained(resumed, again, range(2, 4))
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize(("fused", "place"), [(False, "cpu"), (True, "meta")])
def test_the_count_of_steps_lies_where_the_kernel_reads_it(fused: bool, place: str) -> None:
    """On the meta device, which is another device than the CPU's."""
    parameters: dict[str, Any] = {"a": torch.ones(2, device="meta", requires_grad=True)}
    optimizer = make_optimizer([*parameters.values()], KNOBS["adamw"], fused)
    stored = {"a|step": torch.tensor(3.0), "a|exp_avg": torch.ones(2), "a|exp_avg_sq": torch.ones(2)}
    restore_optimizer(optimizer, parameters, stored)
    state = optimizer.state[parameters["a"]]
    assert state["step"].device.type == place
    assert state["exp_avg"].device.type == "meta"


def test_a_run_with_fused_optimizers_is_another_stage_only_where_asked(smoke: DirRun) -> None:
    from dircluster.training.stages import find_stage, stage_key

    def key(**training: Any) -> str:
        run = dataclasses.replace(smoke, training=dataclasses.replace(smoke.training, **training))
        return stage_key(run, find_stage(run, "dir"), {})

    assert key(fused="auto") == key()
    assert key(fused="on") != key()


@pytest.mark.parametrize("name", KNOBS)
def test_an_optimizer_has_what_its_settings_say(name: Any) -> None:
    knobs = OptimizerConfig(name=name, lr=0.3, momentum=0.8, beta2=0.7, weight_decay=0.02)
    (group,) = make_optimizer([*fresh().values()], knobs).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.02)
    assert group["momentum"] == 0.8 if name == "sgd" else group["betas"] == (0.8, 0.7)
