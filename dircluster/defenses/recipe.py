"""What a recipe is: the modules it trains, how it crafts its samples, and the loss it minimizes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dircluster.rng import Stream


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step. A recipe's ``craft`` fills the last two fields."""

    images: Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: Tensor
    """(N,) int64."""
    stream: Stream
    """The step's draws."""
    adversarial: Tensor | None = None
    """(N, C, H, W) in [0, 1]."""
    kept: Tensor | None = None
    """Masks (K, N, n)."""


class Recipe(nn.Module):
    """A step is ``recipe(recipe.craft(batch))``: nothing in it logs, prints or waits for a device."""

    trained: tuple[str, ...] = ()
    """Names of the submodules whose weights the recipe trains."""
    restores = False
    """Whether :meth:`restore` means anything: the recipe has a denoiser."""

    def craft(self, batch: Batch) -> Batch:
        """The batch with its adversarial samples and masks, detached."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar loss terms, the one to minimize under ``loss``; batch means."""
        raise NotImplementedError

    def predict(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """Logits of what the recipe would deploy: (N, C, H, W), masks -> (N, classes)."""
        raise NotImplementedError

    def restore(self, images: Tensor, kept: Tensor) -> Tensor:
        """What the denoiser makes of images under masks (K, N, n): (N, C, H, W) -> (N, C, H, W)."""
        raise NotImplementedError
