"""Targets: the field's networks, timm's, and the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dircluster.config import ConfigError, DataConfig
from dircluster.models.classifiers import build, check_classes

COLOUR = DataConfig(name="cifar10", height=32, width=32, channels=3)


@pytest.mark.parametrize("architecture", ["resnet18", "small_cnn", "timm:resnet10t"])
def test_logits(architecture: str) -> None:
    network = build(architecture, COLOUR).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    check_classes(network, COLOUR)


def test_resnet18_has_the_published_size() -> None:
    assert sum(p.numel() for p in build("resnet18", COLOUR).parameters()) == 11_173_962  # METHOD: 11.17 M


def test_images_are_normalised_inside() -> None:
    network = build("small_cnn", DataConfig()).eval()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(network(images), network.network((images - 0.5) / 0.5))


def test_a_users_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_target.py").write_text(
        "from torch import nn\n"
        "def make(classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes))\n"
        "def wrong(classes, channels):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build("my_target:make", DataConfig())(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ConfigError, match=r"must return a torch.nn.Module, got int"):
        build("my_target:wrong", DataConfig())
    with pytest.raises(ConfigError, match="cannot be imported"):
        build("my_target:absent", DataConfig())
    with pytest.raises(ConfigError, match="cannot be imported"):
        build("no_such_module:make", DataConfig())
    sys.modules.pop("my_target", None)


def test_an_unknown_timm_model_is_named() -> None:
    with pytest.raises(ConfigError, match="timm has no model 'resnet999'"):
        build("timm:resnet999", COLOUR)


@pytest.mark.parametrize("architecture", ["resnet18", "small_cnn", "timm:resnet10t"])
def test_a_target_is_checked_on_the_device_that_it_lies_on(architecture: str) -> None:
    check_classes(build(architecture, COLOUR).to("meta"), COLOUR)  # a CPU image would not meet these weights


def test_a_wrong_class_count_is_found() -> None:
    with pytest.raises(ConfigError, match=r"gives 10 classes, but data.classes is 7"):
        check_classes(build("small_cnn", DataConfig()), DataConfig(classes=7))


def test_a_target_of_other_images_is_found() -> None:
    with pytest.raises(ConfigError, match="cannot take 1x8x8 images"):
        check_classes(build("resnet18", COLOUR), DataConfig())


def test_a_check_leaves_every_part_in_its_mode() -> None:
    classifier = build("resnet18", DataConfig(channels=3, height=8, width=8)).train()
    frozen_part = next(part for part in classifier.modules() if isinstance(part, torch.nn.BatchNorm2d))
    frozen_part.eval()
    modes = [part.training for part in classifier.modules()]
    check_classes(classifier, DataConfig(channels=3, height=8, width=8))
    assert [part.training for part in classifier.modules()] == modes
