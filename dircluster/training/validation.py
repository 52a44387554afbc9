"""Held-out accuracy while training: which weights a stage keeps, and what its pictures are drawn from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import threat_of
from dircluster.config import RunConfig
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.defenses.recipe import Recipe
from dircluster.distributed.parallel import Parallel
from dircluster.models.modules import under_attack
from dircluster.models.precision import autocast

GAUGED = 128
"""Most held-out images that the gauge of overfitting looks at."""
PICTURED, ROWS = 8, 5
"""Held-out images of a picture, one a column, and its rows; four where a purifier sees all of an image."""


class Judge:
    """Scores one split, sharded over the workers; an image's numbers depend neither on its batch nor its worker."""

    def __init__(self, split: Split, config: RunConfig, parallel: Parallel, purpose: str, batch_size: int) -> None:
        self.split, self.config, self.parallel, self.purpose = split, config, parallel, purpose
        self.batch_size = batch_size
        share = -(-len(split) // parallel.world)
        mine = torch.arange(share) * parallel.world + parallel.rank
        # Where shares differ, the last image is judged twice: workers that share a model pass through it together.
        self.batches = list(torch.split(mine.clamp(max=len(split) - 1), batch_size))

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the rows, on the worker's device."""
        device = self.parallel.device
        return self.split.pixels(rows).to(device), self.split.labels[rows].to(device)

    def stream(self, rows: Tensor) -> rng.ImageStream:
        """The draws of the rows: each image's own, whatever it is judged for."""
        count, device, images = len(rows), self.parallel.device, tuple(rows.tolist())
        return rng.ImageStream(self.config.seed, 0, 0, count, slice(0, count), device, self.purpose, images)

    def draws(self, deployed: nn.Module, rows: Tensor, purpose: str = "masks") -> Tensor | None:
        """What a purifier draws for the rows: -> (N, ...); None where it draws nothing, or there is none."""
        return self.stream(rows).sample(purpose, deployed.purifier.draw) if isinstance(deployed, Defended) else None

    def model(self, deployed: nn.Module, rows: Tensor, renewed: bool = False) -> Callable[[Tensor], Tensor]:
        """Images of the rows -> logits; what a purifier draws is known, or ``renewed`` at every call."""
        if not isinstance(deployed, Defended):
            return deployed
        if not renewed:
            return partial(deployed.logits, draws=self.draws(deployed, rows))
        calls = itertools.count(1)
        return lambda images: deployed.logits(images, self.draws(deployed, rows, f"masks/{next(calls)}"))

    def pgd(self, deployed: nn.Module, rows: Tensor, steps: int | None = None, renewed: bool = False) -> Tensor:
        """The rows' images, attacked: by so many steps of the evaluation's size, or as training does on its own."""
        attack, (images, labels) = self.config.attack, self.batch(rows)
        start = self.stream(rows).uniform("pgd", tuple(images.shape[1:]))
        count, size = (attack.steps, attack.step) if steps is None else (steps, attack.step_for(steps))
        return pgd(self.model(deployed, rows, renewed), images, labels, threat_of(attack), count, size, start)

    def collect(self, right: Callable[[Tensor], Tensor]) -> Tensor:
        """``right`` of every batch of rows, (n, columns) bool, as one (total, columns) tensor on all workers."""
        parts = [right(rows).double().cpu() for rows in self.batches]
        return self.parallel.gather_rows(torch.cat(parts), torch.cat(self.batches), len(self.split)) > 0.5


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, classes), (N,) -> (N,) bool."""
    return logits.argmax(dim=1) == labels


def _batch_size(config: RunConfig, parallel: Parallel) -> int:
    """Images judged together: on a GPU no more than fit where a step of training does.

    Frozen passes keep less than half of the activations of a step, unless that computes them again.
    """
    if parallel.device.type == "cpu":
        return config.evaluation.batch_size
    share = config.training.microbatch or math.ceil(config.training.batch_size / parallel.world)
    return share if config.parallel.activation_checkpointing else 2 * share


def held_out_accuracy(deployed: nn.Module, split: Split, config: RunConfig, parallel: Parallel) -> tuple[float, float]:
    """Natural accuracy, and accuracy under PGD with draws known, of a classifier or a Defended.

    PGD is of ``training.select_steps`` steps, or of the training attack's steps and size.
    """
    split, device = split.take(slice(config.training.select_images)), parallel.device
    judge = Judge(split, config, parallel, "selection", _batch_size(config, parallel))

    def right(rows: Tensor) -> Tensor:
        images, labels = judge.batch(rows)
        model = judge.model(deployed, rows)
        with under_attack(deployed), autocast(config.training.precision, device, deployed):
            adversarial = judge.pgd(deployed, rows, config.training.select_steps)
            with torch.no_grad():
                return torch.stack([_right(model(images), labels), _right(model(adversarial), labels)], dim=1)

    natural, robust = judge.collect(right).double().mean(dim=0).tolist()
    return natural, robust


def overfitting(
    recipe: Recipe, deployed: nn.Module, split: Split, config: RunConfig, parallel: Parallel, images: int = GAUGED
) -> float:
    """The gauge of catastrophic overfitting (Wong et al. 2020), on the first held-out images.

    Accuracy under the attack that ``recipe`` trains against, minus accuracy under PGD-20, which knows the same draws or
    as few: near zero while the training attack is nearly as strong, large where the model has only learned to defeat
    that attack.
    """
    judge = Judge(split.take(slice(images)), config, parallel, "selection", _batch_size(config, parallel))

    def right(rows: Tensor) -> Tensor:
        images, labels = judge.batch(rows)
        model, half = judge.model(deployed, rows), autocast(config.training.precision, parallel.device, deployed)
        with under_attack(deployed), half:
            crafted = recipe.attack(recipe.gauged(recipe.batch(images, labels, judge.stream(rows))))
            strong = judge.pgd(deployed, rows, 20, recipe.renews_draws)
            with torch.no_grad():
                return torch.stack([_right(model(x), labels) for x in (crafted.attacked, strong)], dim=1)

    under_training, under_pgd = judge.collect(right).double().mean(dim=0).tolist()
    return float(under_training - under_pgd)


def restoration_grid(
    deployed: Defended, split: Split, config: RunConfig, device: torch.device, images: int = PICTURED
) -> Tensor:
    """Held-out images through the pipeline, one a column, in [0, 1]: -> (rows, n, C, H, W).

    Rows: natural, adversarial, what the purifier sees of it in its first view (where it does not see all), restored,
    and restored minus natural around mid-gray.
    """
    judge = Judge(split.take(slice(images)), config, Parallel(0, 1, device), "pictures", images)
    rows = torch.arange(len(judge.split))
    natural, _ = judge.batch(rows)
    draws = judge.draws(deployed, rows)
    with under_attack(deployed):
        adversarial = judge.pgd(deployed, rows)
        with torch.no_grad():
            restored = deployed.purifier(adversarial, draws)
    seen = list(itertools.islice(deployed.purifier.visible(adversarial, draws), 1))
    moved = restored - natural
    difference = 0.5 + moved / (2 * moved.abs().amax().clamp_min(1.0))  # restored images may leave [0, 1]
    return torch.stack([natural, adversarial, *seen, restored, difference]).clamp(0, 1).cpu()
