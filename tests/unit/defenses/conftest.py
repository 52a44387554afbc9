"""The smallest DIR, that nobody trained, before the smallest target."""

from __future__ import annotations

import pytest

from dircluster import rng
from dircluster.config import DataConfig
from dircluster.defenses.base import Defended
from dircluster.defenses.dir import MaskedPurifier
from dircluster.models.classifiers import build
from dircluster.presets.dir import MaskingConfig, ModelConfig

TINY = ModelConfig(patch=2, width=16, heads=2, encoder_depth=1, decoder_depth=1)


@pytest.fixture
def defense() -> Defended:
    """Of digits (1, 8, 8)."""
    with rng.seeded_torch_rng(0, "defended"):
        return Defended(MaskedPurifier(TINY, MaskingConfig(), 1, 8, 8), build("small_cnn", DataConfig())).eval()
