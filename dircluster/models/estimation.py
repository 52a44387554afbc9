"""Matrix estimation as ME-Net (Yang et al. 2019) fills in what a mask drops: USVT, Soft-Impute, nuclear norm.

Each of them changes singular values alone. With U the eigenvectors of the small Gram matrix X X^T, that is a product
with U diag(gain) U^T, which costs far less than the singular vectors of X. These filters are constants to autograd:
gradients of eigenvectors explode where eigenvalues lie close together. What autograd follows is thus the map with its
mask and its projector held, a better model of it than the identity that BPDA assumes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Gain = Callable[[Tensor], Tensor]
"""Singular values (N, r), rising -> what each is multiplied by, (N, r)."""


def filtered(matrices: Tensor, gain: Gain) -> Tensor:
    """Matrices whose singular values s become gain(s) s: (N, r, c) -> (N, r, c), best with r <= c."""
    with torch.no_grad():
        squares, vectors = torch.linalg.eigh(matrices @ matrices.mT)
        filters = (vectors * gain(squares.clamp_min(0).sqrt())[:, None, :]) @ vectors.mT
    found: Tensor = filters @ matrices
    return found


def shrunk(matrices: Tensor, threshold: Tensor | float) -> Tensor:
    """Singular values lowered by ``threshold``, (N, 1) or one for all, those below it to zero: -> (N, r, c)."""
    return filtered(matrices, lambda s: (1 - threshold / s.clamp_min(1e-30)).clamp_min(0))


def usvt(matrices: Tensor, mask: Tensor, rank: int) -> Tensor:
    """Universal singular value thresholding (Chatterjee 2015): the ``rank`` largest of the zero-filled matrix.

    (N, r, c), mask (N, r, c) bool -> (N, r, c), divided by the share of entries that each mask really kept.
    """
    share = mask.to(matrices.dtype).mean(dim=(1, 2), keepdim=True).clamp_min(1 / mask[0].numel())
    rows = matrices.shape[1]
    largest = torch.arange(rows, device=matrices.device) >= rows - rank
    return filtered(matrices * mask, lambda s: largest.to(s.dtype).expand_as(s)) / share


def soft_impute(matrices: Tensor, mask: Tensor, shrinkage: float, iterations: int, tolerance: float) -> Tensor:
    """Soft-Impute (Mazumder et al. 2010): missing entries are those of the shrunk matrix, observed ones stay exact.

    (N, r, c), mask (N, r, c) bool -> (N, r, c). The threshold is ``shrinkage`` times the largest singular value of the
    zero-filled matrix. A matrix is done once its missing entries move by less than ``tolerance`` of their norm.
    """
    observed = matrices * mask
    with torch.no_grad():
        threshold = shrinkage * torch.linalg.eigvalsh(observed @ observed.mT)[:, -1:].clamp_min(0).sqrt()
    return _iterated(
        observed, lambda x: torch.where(mask, observed, shrunk(x, threshold)), ~mask, iterations, tolerance
    )


def nuclear_norm(matrices: Tensor, mask: Tensor, weight: float, iterations: int, tolerance: float) -> Tensor:
    """argmin over X of weight ||X||_* + ||M o (X - A)||^2 by proximal steps: (N, r, c), mask bool -> (N, r, c)."""
    observed = matrices * mask
    whole = torch.ones_like(mask)
    return _iterated(
        observed, lambda x: shrunk(torch.where(mask, observed, x), weight / 2), whole, iterations, tolerance
    )


def _iterated(start: Tensor, step: Callable[[Tensor], Tensor], watched: Tensor, most: int, tolerance: float) -> Tensor:
    """``step`` on each matrix until its ``watched`` entries (N, r, c) settle: its result is its own, in any batch."""
    reached, done = start, torch.zeros_like(watched[:, :1, :1])
    for _ in range(most):
        found = step(reached)
        with torch.no_grad():
            moved, size = (
                torch.linalg.matrix_norm(part * watched, keepdim=True) for part in (found - reached, reached)
            )
            settled = (size > 0) & (moved < tolerance * size)
        reached, done = torch.where(done, reached, found), done | settled
        if done.device.type == "cpu" and bool(done.all()):  # elsewhere nobody waits for the device to ask
            break
    return reached
