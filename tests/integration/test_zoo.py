"""The weights that come with the repository: they load, and hold on real images what docs/results.md says of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch

import dircluster
from dircluster.config import DataConfig
from dircluster.data.decode import decode
from dircluster.data.parquet import columns


def test_the_first_cifar10_defense_classifies_as_it_was_measured(root: Path, real_data: Path) -> None:
    defense = dircluster.load_defense(str(root / "dircluster" / "zoo" / "cifar10-dir"))
    file = next((real_data / "cifar10").glob("test*.parquet"))
    blobs, labels = columns(pq.read_table(file).slice(0, 64), file)
    images = decode(blobs, DataConfig(name="cifar10", height=32, width=32, channels=3)).float() / 255
    with torch.no_grad():
        restored = defense.fixed(seed=0)(images).argmax(dim=1) == torch.tensor(labels)
        bare = defense.classifier(images).argmax(dim=1) == torch.tensor(labels)
    # Measured on 1,000 images: 77.4 and 83.5 %; four standard deviations of 64 images below that.
    assert restored.double().mean() > 0.56
    assert bare.double().mean() > 0.64
