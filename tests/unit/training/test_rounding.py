"""A run says which of its networks round their images in bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.config import with_values
from dircluster.presets.dir import DirRun
from dircluster.training.protocols import NoTracker
from dircluster.training.run import Run
from dircluster.training.stages import Networks
from tests.conftest import ALONE
from tests.unit.training.conftest import Hears


class Functional(nn.Module):
    """A network whose layers nobody sees."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, 64))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(images.flatten(1), self.weight)


def plain(classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


@pytest.mark.parametrize(
    ("architecture", "precision", "named"),
    [
        (f"{__name__}:Functional", "bf16", True),
        (f"{__name__}:Functional", "auto", False),  # fp32 on a CPU
        (f"{__name__}:plain", "bf16", False),
        ("small_cnn", "bf16", False),
    ],
)
def test_networks_that_round_their_images_are_named(
    smoke: DirRun, architecture: str, precision: str, named: bool
) -> None:
    config = with_values(smoke, {"target.architecture": architecture, "training.precision": precision})
    listener = Hears()
    Run(config, ALONE, NoTracker(), listener)._name_what_rounds(Networks(config, ALONE))
    assert [line.partition(":")[0] for line in listener.lines] == ["classifier"] * named
