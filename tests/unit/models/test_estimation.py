"""Matrix estimation by the Gram matrix, against NumPy's singular values in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dircluster.models.estimation import filtered, nuclear_norm, shrunk, soft_impute, usvt


def matrices(count: int = 3, rows: int = 6, columns: int = 18) -> tuple[Tensor, Tensor]:
    """Matrices in [-1, 1] of low rank with some noise, and masks that keep half."""
    generator = torch.Generator().manual_seed(rows)
    low = torch.rand(count, rows, 2, generator=generator, dtype=torch.float64) - 0.5
    high = torch.rand(count, 2, columns, generator=generator, dtype=torch.float64) - 0.5
    noise = torch.rand(count, rows, columns, generator=generator, dtype=torch.float64) - 0.5
    made = (low @ high * 2 + 0.1 * noise).clamp(-1, 1)
    return made, torch.rand(count, rows, columns, generator=generator) < 0.5


def lowered(matrix: np.ndarray, threshold: float) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u * np.maximum(s - threshold, 0)) @ v


def test_usvt_keeps_the_largest_singular_values_and_divides_by_what_each_mask_kept() -> None:
    given, masks = matrices()
    found = usvt(given, masks, 4)
    for matrix, mask, one in zip(given.numpy(), masks.numpy(), found.numpy(), strict=True):
        u, s, v = np.linalg.svd(np.where(mask, matrix, 0), full_matrices=False)
        expected = (u[:, :4] * s[:4]) @ v[:4] / (mask.sum() / mask.size)
        np.testing.assert_allclose(one, expected, atol=1e-10)
    torch.testing.assert_close(usvt(given.float(), masks, 4), found.float(), atol=2e-6, rtol=0)
    assert usvt(given, torch.zeros_like(masks), 4).isfinite().all()  # a mask that keeps nothing


def test_soft_impute_is_that_of_fancyimpute() -> None:
    given, masks = matrices()
    found = soft_impute(given, masks, 0.02, 100, 1e-3)
    for matrix, mask, one in zip(given.numpy(), masks.numpy(), found.numpy(), strict=True):
        filled = np.where(mask, matrix, 0)
        threshold = np.linalg.svd(filled, compute_uv=False)[0] * 0.02
        for _ in range(100):
            better = lowered(filled, threshold)
            missing = ~mask
            moved, size = np.linalg.norm((better - filled)[missing]), np.linalg.norm(filled[missing])
            filled = np.where(mask, matrix, better)
            if size > 0 and moved / size < 1e-3:
                break
        np.testing.assert_allclose(one, filled, atol=1e-9)
        np.testing.assert_array_equal(one[mask], matrix[mask])  # what was observed stays exact


def test_the_nuclear_norm_is_minimized() -> None:
    """Its optimality condition: 2 M o (A - X) / weight is a subgradient of ||X||_*."""
    given, masks = matrices()
    weight = 0.3
    found = nuclear_norm(given, masks, weight, 3000, 1e-12)
    for matrix, mask, one in zip(given.numpy(), masks.numpy(), found.numpy(), strict=True):
        slope = 2 * np.where(mask, matrix - one, 0) / weight
        u, s, v = np.linalg.svd(one, full_matrices=False)
        alive = s > 1e-6
        assert 0 < alive.sum() < len(s)
        np.testing.assert_allclose((u.T @ slope @ v.T)[np.ix_(alive, alive)], np.eye(alive.sum()), atol=1e-4)
        assert np.linalg.svd(slope, compute_uv=False)[0] <= 1 + 1e-6


def test_shrunk_lowers_singular_values() -> None:
    given, _ = matrices()
    for matrix, one in zip(given.numpy(), shrunk(given, 0.4).numpy(), strict=True):
        np.testing.assert_allclose(one, lowered(matrix, 0.4), atol=1e-10)


@pytest.mark.parametrize("method", ["usvt", "soft_impute", "nuclear_norm"])
def test_a_matrix_is_estimated_alone_whatever_its_batch(method: str) -> None:
    given, masks = matrices(4)

    def estimate(some: Tensor, kept: Tensor) -> Tensor:
        if method == "usvt":
            return usvt(some, kept, 4)
        if method == "soft_impute":
            return soft_impute(some, kept, 0.02, 60, 1e-3)
        return nuclear_norm(some, kept, 0.3, 60, 1e-3)

    alone = torch.cat([estimate(given[i : i + 1], masks[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(estimate(given, masks), alone, atol=1e-10, rtol=0)


def test_the_filter_is_constant_to_gradients() -> None:
    """So that equal singular values, whose vectors have no derivative, do no harm."""
    given = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 2).requires_grad_(True)
    (slope,) = torch.autograd.grad(filtered(given, lambda s: 0.5 * torch.ones_like(s)).sum(), given)
    torch.testing.assert_close(slope, 0.5 * torch.ones_like(given))
