"""Tests draw the same numbers every time, whichever of them ran before: at import, in fixtures, and themselves."""

from __future__ import annotations

import pytest
import torch

IMPORTED = torch.rand(3)


def expected() -> torch.Tensor:
    return torch.rand(3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shared() -> torch.Tensor:
    return torch.rand(3)


def test_draws_of_an_import_and_of_a_test() -> None:
    assert torch.equal(IMPORTED, expected())
    assert torch.equal(torch.rand(3), expected())
    torch.rand(7)  # which the fixture below does not notice


def test_draws_of_a_fixture_that_tests_share(shared: torch.Tensor) -> None:
    assert torch.equal(shared, expected())
    assert torch.equal(torch.rand(3), expected())
