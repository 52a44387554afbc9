"""A machine to examine: this one's CPU, and the smallest run."""

from __future__ import annotations

import pytest
import torch

from dircluster.distributed.parallel import Parallel
from dircluster.doctor.machine import Machine
from dircluster.presets import preset


@pytest.fixture
def machine() -> Machine:
    return Machine(preset("digits_smoke"), Parallel(0, 1, torch.device("cpu")))
