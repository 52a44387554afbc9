"""What a recipe is: the modules it trains, the samples it attacks, and the loss it minimizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dircluster.defenses.base import Purifier
from dircluster.rng import Stream


@dataclass(frozen=True)
class Batch:
    """One worker's share of a step. A recipe's ``attack`` fills the last field."""

    images: Tensor
    """(N, C, H, W) in [0, 1]."""
    labels: Tensor
    """(N,) int64."""
    draws: Mapping[str, Tensor]
    """All randomness of the step by name, one row an image: what :meth:`Recipe.draws` made."""
    adversarial: Tensor | None = None
    """(N, C, H, W) in [0, 1]."""
    number: int = 0
    """Of the step within its stage."""

    @property
    def attacked(self) -> Tensor:
        """The adversarial images of a batch that has been attacked."""
        assert self.adversarial is not None, "attack before forward"
        return self.adversarial


class Recipe(nn.Module):
    """A step is ``recipe(recipe.attack(batch))``: nothing in it logs, prints or waits for a device."""

    trained: tuple[str, ...] = ()
    """Names of the submodules whose weights the recipe trains."""
    attacks_deployed = False
    """Whether :meth:`attack` is aimed at what is deployed: then held-out images tell whether it has overfitted."""
    renews_draws = False
    """Whether every step of it meets new draws of a purifier, and none those that the update then has: then PGD-20,
    which it is held against, knows as little."""

    @property
    def capturable(self) -> bool:
        """Whether a step launches the same work each time, so that it can be recorded as one CUDA graph.

        False where its passes wait for the device, or depend on Python values that change from step to step.
        """
        return True

    @property
    def alone(self) -> str | None:
        """Why several workers cannot share a step; None where they can."""
        return "has several updates a step, which one worker makes" if len(self.updates) > 1 else None

    @property
    def updates(self) -> tuple[tuple[str, ...], ...]:
        """Submodules whose optimizers step in each update of a step, in order; a GAN has several updates."""
        return (self.trained,)

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """All randomness of a step on images of ``shape`` (C, H, W), by name.

        It is made ahead of time, on another thread: it neither reads nor changes weights.
        """
        return {}

    def batch(self, images: Tensor, labels: Tensor, stream: Stream, number: int = 0) -> Batch:
        """Images (N, C, H, W), labels (N,) and the draws that ``stream`` makes for them, for step ``number``."""
        return Batch(images, labels, self.draws(stream, tuple(images.shape[1:])), number=number)

    def gauged(self, batch: Batch) -> Batch:
        """``batch`` as the gauge of overfitting attacks it: every image, and as most batches are attacked.

        Steps that every k-th batch alone gets (``attack.pipeline_every``) are left out.
        """
        return replace(batch, number=1)

    def attack(self, batch: Batch) -> Batch:
        """The batch with its adversarial samples, detached; as it is where the recipe needs none."""
        return batch

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """Scalar loss terms of an update, the one to minimize under ``loss``; batch means."""
        raise NotImplementedError

    def deployed(self) -> nn.Module | None:
        """What held-out validation attacks: a classifier or a Defended; None where there is nothing to validate."""
        return None


def drawn(stream: Stream, purpose: str, purifier: Purifier) -> dict[str, Tensor]:
    """What one pass through ``purifier`` draws, under the name ``purpose``; nothing where it draws nothing."""
    found = stream.sample(purpose, purifier.draw)
    return {} if found is None else {purpose: found}


def freeze(module: nn.Module) -> nn.Module:
    """``module`` in eval mode, its parameters asking for no gradient: a target that the stage does not train."""
    module.requires_grad_(False)
    module.eval()  # it and train of somebody's own return what they like
    return module
