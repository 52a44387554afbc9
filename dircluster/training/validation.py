"""Held-out accuracy while training: which weights a stage keeps, and what its pictures are drawn from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import threat_of
from dircluster.config import RunConfig
from dircluster.data.split import Split
from dircluster.defenses.recipe import Recipe
from dircluster.distributed.parallel import Parallel
from dircluster.models.masking import complementary_masks, pixel_mask
from dircluster.models.modules import under_attack


class Judge:
    """Scores one split, sharded over the workers; an image's numbers depend neither on its batch nor its worker."""

    def __init__(self, split: Split, config: RunConfig, parallel: Parallel, purpose: str, batch_size: int) -> None:
        self.split, self.config, self.parallel, self.purpose = split, config, parallel, purpose
        self.batch_size = batch_size
        self.threat, self.step_size = threat_of(config.attack), config.attack.step
        share = -(-len(split) // parallel.world)
        mine = torch.arange(share) * parallel.world + parallel.rank
        # Where shares differ, the last image is judged twice: workers that share a model pass through it together.
        self.batches = list(torch.split(mine.clamp(max=len(split) - 1), batch_size))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the rows, on the worker's device."""
        device = self.parallel.device
        return self.split.pixels(rows).to(device), self.split.labels[rows].to(device)

    def start(self, rows: Tensor) -> Tensor:
        """Uniform draws for PGD's random start."""
        shape = tuple(self.split.images.shape[1:])
        return rng.per_image(self.config.seed, f"{self.purpose}/pgd", rows, shape).float().to(self.parallel.device)

    def masks(self, rows: Tensor) -> Tensor:
        """Masks of the rows: -> (K, N, n)."""
        keys = rng.per_image(self.config.seed, f"{self.purpose}/masks", rows, (self.config.tokens,))
        return complementary_masks(keys.argsort(dim=1), self.config.masking).to(self.parallel.device)

    def collect(self, right: Callable[[Tensor], Tensor]) -> Tensor:
        """``right`` of every batch of rows, (n, columns) bool, as one (total, columns) tensor on all workers."""
        parts = [right(rows).double().cpu() for rows in self.batches]
        return self.parallel.gather_rows(torch.cat(parts), torch.cat(self.batches), len(self.split)) > 0.5


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1) == labels


def held_out_accuracy(recipe: Recipe, split: Split, config: RunConfig, parallel: Parallel) -> tuple[float, float]:
    """Natural accuracy, and accuracy under the training attack with masks known, of what ``recipe`` would deploy."""
    split = split.take(slice(config.training.select_images))
    judge = Judge(split, config, parallel, "selection", config.evaluation.batch_size)

    def right(rows: Tensor) -> Tensor:
        images, labels = judge.batch(rows)
        kept = judge.masks(rows) if recipe.restores else None

        def model(candidates: Tensor) -> Tensor:
            return recipe.predict(candidates, kept)

        with under_attack(recipe):
            steps = config.attack.steps
            adversarial = pgd(model, images, labels, judge.threat, steps, judge.step_size, judge.start(rows))
            with torch.no_grad():
                return torch.stack([_right(model(images), labels), _right(model(adversarial), labels)], dim=1)

    natural, robust = judge.collect(right).double().mean(dim=0).tolist()
    return natural, robust


ROWS = ("natural", "adversarial", "masked", "restored", "difference")
"""Rows of :func:`restoration_grid`, from top to bottom; difference is restored minus natural, around mid-gray."""


def restoration_grid(recipe: Recipe, split: Split, config: RunConfig, device: torch.device, images: int = 8) -> Tensor:
    """Held-out images through the pipeline, one a column, in [0, 1]: -> (len(ROWS), n, C, H, W)."""
    judge = Judge(split.take(slice(images)), config, Parallel(0, 1, device), "pictures", images)
    rows = torch.arange(len(judge.split))
    natural, labels = judge.batch(rows)
    kept = judge.masks(rows)
    with under_attack(recipe):
        adversarial = pgd(
            lambda x: recipe.predict(x, kept),
            natural,
            labels,
            judge.threat,
            config.attack.steps,
            judge.step_size,
            judge.start(rows),
        )
        with torch.no_grad():
            restored = recipe.restore(adversarial, kept)
    masked = adversarial * pixel_mask(kept, config.data.height, config.data.width, config.model.patch)[0]
    moved = restored - natural
    difference = 0.5 + moved / (2 * moved.abs().amax().clamp_min(1.0))  # restored images may leave [0, 1]
    return torch.stack([natural, adversarial, masked, restored, difference]).clamp(0, 1).cpu()
