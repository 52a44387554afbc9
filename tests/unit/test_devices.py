"""Nothing that is made beside a model or an image lies on the CPU where these do not: seen on the meta device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dircluster.config import AttackConfig, EvaluationConfig, RunConfig
from dircluster.defenses.target import TargetRecipe
from dircluster.distributed.parallel import Parallel
from dircluster.evaluation.attack_runner import AttackRunner, judge
from dircluster.evaluation.gradient_masking import check_specs
from dircluster.evaluation.suites import AttackSpec, suite
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import frozen
from dircluster.presets import preset
from dircluster.presets.dir import DirRun
from dircluster.rng import Stream
from dircluster.training import stages

META = torch.device("meta")
FEW = EvaluationConfig(steps=1, eot=2, draws=2, restarts=2, resubmissions=2, votes=2)
LIBRARY = ("autoattack", "malt", "pma", "square")
"""Attacks of pyautoattack look into the values of tensors, which meta tensors have none of."""


def images(config: RunConfig, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    data = config.data
    shape = (count, data.channels, data.height, data.width)
    return torch.zeros(shape, device=META), torch.zeros(count, dtype=torch.int64, device=META)


def networks(config: RunConfig) -> stages.Networks:
    return stages.Networks(config, Parallel(0, 1, META))


def stream() -> Stream:
    return Stream(0, 0, 0, 4, slice(0, 4), META)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("stage", ["target", "pretrain", "dir"])
def test_a_step_stays_on_the_device_of_its_models(stage: str, joint: bool) -> None:
    config = preset("digits_smoke")
    assert isinstance(config, DirRun)
    if joint and stage != "dir":
        joint = False  # the other stages have no such mode
    knobs = dataclasses.replace(config.dir, joint=joint, crafting_masks="fresh", mse_weight=0.1)
    epochs = 0 if joint else 1
    config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, epochs=epochs), dir=knobs)
    recipe = stages.find_stage(config, stage).recipe(networks(config)).train()
    losses = recipe(recipe.attack(recipe.batch(*images(config), stream())))
    losses["loss"].backward()
    assert {value.device for value in losses.values()} == {META}


@pytest.mark.parametrize("objective", ["natural", "at", "trades", "mart"])
def test_a_step_of_any_target_stays_on_its_device(objective: Any) -> None:
    config = preset("digits_smoke")
    target = dataclasses.replace(config.target, objective=objective)
    recipe = TargetRecipe(networks(config)["classifier"], target, config.attack).train()
    losses = recipe(recipe.attack(recipe.batch(*images(config), stream())))
    assert {value.device for value in losses.values()} == {META}


def cases() -> list[AttackSpec]:
    kind: dict[str, Any] = {"randomized": True, "purifies": True, "transfers": True, "masked": True}
    found = [case for name in ("quick", "paper", "rigorous") for case in suite(name, AttackConfig(), FEW, **kind)]
    found += check_specs(AttackConfig(), FEW, randomized=True, transfers=True).values()
    brief: dict[str, Any] = {"epsilon": 0.1, "step_size": 0.1, "label": "", "first": None}
    short = (dataclasses.replace(case, steps=min(case.steps, 1), **brief) for case in found)
    kinds = {(c.attack, c.randomness, c.on, c.judged, c.norm, c.loss, c.source, c.protocol): c for c in short}
    return [case for case in kinds.values() if case.attack not in LIBRARY]


@pytest.mark.long
def test_every_attack_and_judgment_stays_on_the_device_of_its_images() -> None:
    config = preset("digits_smoke")
    made = networks(config)
    subject = VictimModel(made.defense.defended(config, made), "dir")
    pictures, labels = images(config)
    seen = set()
    for case in cases():
        with frozen(subject.module):
            found, _ = AttackRunner(subject, case, 0, 0, 6)(pictures, labels)
            assert found.device == META, case
            with torch.no_grad():
                right = judge(subject, case, 0, 0, 6)(found, labels)
        assert {part.device for part in right.values()} == {META}, case
        seen.add(case.attack)
    assert len(seen) >= 9
