"""Operations of a step: counted without computing it, backward passes of attention included."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dircluster.presets import preset
from dircluster.rng import Stream
from dircluster.training import costs, stages
from tests.conftest import ALONE


@pytest.mark.parametrize("stage", ["target", "pretrain", "dir", "joint", "joint_trades"])
def test_what_is_counted_without_computing_is_what_is_computed(stage: str) -> None:
    config = preset("digits_smoke")
    if stage.startswith("joint"):
        trades = stage == "joint_trades"
        config = dataclasses.replace(
            config,
            target=dataclasses.replace(config.target, objective="trades" if trades else "at"),
            pretrain=dataclasses.replace(config.pretrain, epochs=0),
            dir=dataclasses.replace(config.dir, joint=True, alpha=0.0 if trades else config.dir.alpha),
        )
    name = "dir" if stage.startswith("joint") else stage
    networks = stages.Networks(config, ALONE)
    images = config.training.batch_size
    recipe, stream = (
        stages.find_stage(config, name).recipe(networks).train(),
        Stream(0, 0, 0, images, slice(0, images), torch.device("cpu")),
    )
    batch = recipe.batch(torch.rand(images, 1, 8, 8), torch.zeros(images, dtype=torch.int64), stream)
    with costs.counting() as computed:
        recipe(recipe.attack(batch))["loss"].backward()
    assert costs.step_operations(config, name) == computed.total > 0


def test_an_image_that_is_alone_passes_layers_of_batch_statistics() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 8), torch.nn.BatchNorm2d(2)).to("meta")
    assert costs.forward_operations(network, torch.zeros(1, 1, 8, 8, device="meta")) == 2 * 2 * 64
    assert network.training


def test_a_backward_pass_of_attention_is_twice_its_forward() -> None:
    q, k, v = (torch.zeros(1, 2, 5, 4, device="meta", requires_grad=True) for _ in range(3))
    with costs.counting() as forward:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert forward.total == 2 * 2 * (2 * 5 * 5 * 4)
    with costs.counting() as backward:
        out.sum().backward()
    assert backward.total == 2 * forward.total


@pytest.mark.long
def test_the_papers_dir_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """13 L + 18 A + 24 h an image: linear layers and attention of g, and h. L and A by hand, from the sizes."""
    config = preset("cifar10")
    width, masks, kept, tokens = 192, 2, 128, 256
    linear = 2 * tokens * 12 * width  # patch embedding: once, before masks are taken
    linear += masks * 2 * (8 * (kept + 1) + 2 * (tokens + 1)) * 12 * width**2
    linear += masks * 2 * tokens * width * 12  # head
    attention = masks * 4 * width * (8 * (kept + 1) ** 2 + 2 * (tokens + 1) ** 2)
    found = costs.count(config)
    assert found.purifier_forward == linear + attention == pytest.approx(3.147e9, rel=1e-3)
    assert found.purifier_parameters == 4_553_292
    step = costs.step_operations(config, "dir") / config.training.batch_size
    assert step == pytest.approx(13 * linear + 18 * attention + 24 * found.target_forward, rel=1e-3)
    assert step / 1e9 == pytest.approx(69.6, abs=0.05)


def test_recomputed_activations_are_counted() -> None:
    config = preset("digits_smoke")
    again = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, activation_checkpointing=True))
    assert costs.step_operations(again, "dir") > costs.step_operations(config, "dir")
    assert costs.step_operations(again, "target") == costs.step_operations(config, "target")
