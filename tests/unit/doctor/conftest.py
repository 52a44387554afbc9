"""A machine to examine: this one's CPU, and the smallest run."""

from __future__ import annotations

import pytest

from dircluster.doctor.machine import Machine
from dircluster.presets import preset
from tests.conftest import ALONE


@pytest.fixture
def machine() -> Machine:
    return Machine(preset("digits_smoke"), ALONE)
