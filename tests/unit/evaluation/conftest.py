"""An honest, adversarially trained classifier of digits, and images that it has not seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster import rng
from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import LInf
from dircluster.config import DataConfig
from dircluster.data.sources import load
from dircluster.models.classifiers import build
from dircluster.models.modules import frozen

EPSILON = 0.15


def judged_digits() -> tuple[Tensor, Tensor]:
    """128 test images (N, 1, 8, 8) and labels."""
    test = load(DataConfig(), 0).test
    return test.pixels(slice(128)), test.labels[:128]


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    return judged_digits()


@pytest.fixture(scope="session")
def at_model() -> nn.Module:
    """Trained against PGD-5 for a few seconds."""
    train = load(DataConfig(), 0).train
    with rng.seeded_torch_rng(0, "tests/weights"):
        model = build("small_cnn", DataConfig())
    optimizer, draws = torch.optim.Adam(model.parameters(), 2e-3), rng.generator(0, "tests/training")
    images, labels = train.pixels(), train.labels
    for _ in range(12):
        for rows in torch.randperm(len(labels), generator=draws).split(64):
            x, y = images[rows], labels[rows]
            with frozen(model):
                found = pgd(model, x, y, LInf(EPSILON), 5, EPSILON / 4, torch.rand(x.shape, generator=draws))
            optimizer.zero_grad()
            F.cross_entropy(model(found), y).backward()
            optimizer.step()
    return model.eval()
