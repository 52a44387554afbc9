"""Expectation over transformation (Athalye et al. 2018): the gradient of a randomised model, averaged over draws."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dircluster.attacks.gradient import Model, Objective


def expected_cross_entropy(model: Model, labels: Tensor, draws: int) -> Objective:
    """Cross-entropy of each image averaged over ``draws`` passes through a model that draws anew for every row."""

    def objective(images: Tensor) -> Tensor:
        logits = model(images.repeat(draws, 1, 1, 1)).float()
        losses = F.cross_entropy(logits, labels.repeat(draws), reduction="none")
        return losses.view(draws, len(images)).mean(dim=0)

    return objective
