"""Weights that no network at work has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dircluster.config import ConfigError
from dircluster.models.weights import check_weights


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "1.running_var", "3.bias"])
def test_numbers_that_are_not_finite_are_named(name: str, value: float) -> None:
    made = network()
    made.state_dict()[name].view(-1)[0] = value
    with pytest.raises(ConfigError, match=rf"^h.safetensors cannot be used: '{name}' holds numbers that are not"):
        check_weights(made, "h.safetensors")


@pytest.mark.parametrize("name", ["0", "3"])
def test_a_layer_of_zeros_is_named(name: str) -> None:
    made = network()
    made.get_submodule(name).weight.data.zero_()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=rf"the weights of '{name}' are all zero"):
        check_weights(made, "h.safetensors")


def test_fresh_weights_are_those_of_a_network() -> None:
    made = network()
    made[1].weight.data.zero_()  # residual blocks begin so
    check_weights(made, "fresh")
    assert all(value.isfinite().all() for value in made.state_dict().values() if torch.is_floating_point(value))
