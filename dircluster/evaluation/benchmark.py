"""The honest table: natural and robust accuracy of the bare target and of the defence, masks known and fresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks.expectation import expected_cross_entropy
from dircluster.attacks.gradient import ascend, pgd
from dircluster.attacks.threat import LInf
from dircluster.config import RunConfig
from dircluster.data.sources import Split
from dircluster.evaluation.statistics import wilson_interval
from dircluster.models.denoiser import MaskedDenoiser
from dircluster.models.masking import windows
from dircluster.recipes.base import Recipe, crafting
from dircluster.training.parallel import Parallel


@dataclass(frozen=True)
class Result:
    """One accuracy and the evidence for it."""

    defense: str
    """none (the bare target) or dir."""
    attack: str
    """natural, pgd20, ..., or transfer-pgd20 (crafted on the bare target)."""
    masks: str
    """none, fixed (each image's masks known to the attacker), or fresh (drawn anew at every pass)."""
    correct: int
    """Images classified rightly; under fresh masks, in the first draw."""
    total: int
    interval: tuple[float, float]
    """95 % Wilson interval of correct / total, shares."""
    epsilon: float = 0.0
    steps: int = 0
    step_size: float = 0.0
    eot: int = 1
    """Mask draws an attack step averages over."""
    draws: int = 1
    """Mask draws on which the final images were judged."""
    mean: float = 0.0
    """Accuracy averaged over the draws."""
    always: float = 0.0
    """Share of images that are right in every draw."""


class Judge:
    """Scores one split, sharded over the workers; an image's numbers depend neither on its batch nor its worker."""

    def __init__(self, split: Split, config: RunConfig, parallel: Parallel, purpose: str, batch_size: int) -> None:
        self.split, self.config, self.parallel, self.purpose = split, config, parallel, purpose
        self.batch_size = batch_size
        self.threat, self.step_size = LInf(config.attack.epsilon), config.attack.step
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

    def masks(self, rows: Tensor, use: str, draws: int = 1) -> Tensor:
        """Masks of the rows for ``draws`` draws, draw by draw: -> (K, draws * N, n)."""
        keys = rng.per_image(self.config.seed, f"{self.purpose}/{use}", rows, (draws, self.config.tokens))
        order = keys.transpose(0, 1).reshape(draws * len(rows), -1).argsort(dim=1)
        return windows(order, self.config.masking).to(self.parallel.device)

    def collect(self, right: Callable[[Tensor], Tensor], passes: int = 1) -> Tensor:
        """``right`` of every batch of rows, (n, columns) bool, as one (total, columns) tensor on all workers."""
        size = max(1, self.batch_size // passes)  # each image then passes so many times at once
        parts = [right(part).double().cpu() for rows in self.batches for part in torch.split(rows, size)]
        return self.parallel.gather_rows(torch.cat(parts), torch.cat(self.batches), len(self.split)) > 0.5


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(dim=1) == labels


def held_out_accuracy(recipe: Recipe, split: Split, config: RunConfig, parallel: Parallel) -> tuple[float, float]:
    """Natural accuracy, and accuracy under the training attack with masks known, of what ``recipe`` would deploy."""
    split = split.take(slice(config.training.select_images))
    judge = Judge(split, config, parallel, "selection", config.evaluation.batch_size)

    def right(rows: Tensor) -> Tensor:
        images, labels = judge.batch(rows)
        kept = judge.masks(rows, "masks") if recipe.restores else None

        def model(candidates: Tensor) -> Tensor:
            return recipe.predict(candidates, kept)

        with crafting(recipe):
            steps = config.attack.steps
            adversarial = pgd(model, images, labels, judge.threat, steps, judge.step_size, judge.start(rows))
            with torch.no_grad():
                return torch.stack([_right(model(images), labels), _right(model(adversarial), labels)], dim=1)

    natural, robust = judge.collect(right).double().mean(dim=0).tolist()
    return natural, robust


def evaluate(
    denoiser: MaskedDenoiser,
    classifier: nn.Module,
    split: Split,
    config: RunConfig,
    parallel: Parallel,
    said: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Natural, PGD with masks fixed and known, PGD with EOT over fresh masks, and transfer, for target and defence.

    Every final adversarial image that meets fresh masks is judged on ``config.evaluation.draws`` draws of them.
    """
    settings = config.evaluation
    split = split.take(slice(settings.images))
    judge = Judge(split, config, parallel, "evaluation", settings.batch_size)
    draws, steps, attack = settings.draws, settings.steps, f"pgd{settings.steps}"

    def logits(images: Tensor, kept: Tensor) -> Tensor:
        made: Tensor = classifier(denoiser(images, kept))
        return made

    def over_draws(images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        kept = judge.masks(rows, "judge", draws).chunk(draws, dim=1)
        return torch.stack([_right(logits(images, k), labels) for k in kept], dim=1)

    def bare(rows: Tensor) -> Tensor:
        images, labels = judge.batch(rows)
        with crafting(denoiser, classifier):
            adversarial = pgd(classifier, images, labels, judge.threat, steps, judge.step_size, judge.start(rows))
            with torch.no_grad():
                alone = [_right(classifier(images), labels), _right(classifier(adversarial), labels)]
                return torch.cat([torch.stack(alone, dim=1), over_draws(adversarial, labels, rows)], dim=1)

    def fixed(rows: Tensor) -> Tensor:
        images, labels = judge.batch(rows)
        kept = judge.masks(rows, "known")
        with crafting(denoiser, classifier):
            adversarial = pgd(
                lambda x: logits(x, kept), images, labels, judge.threat, steps, judge.step_size, judge.start(rows)
            )
            with torch.no_grad():
                return torch.stack(
                    [_right(logits(images, kept), labels), _right(logits(adversarial, kept), labels)], dim=1
                )

    def fresh(rows: Tensor) -> Tensor:
        images, labels = judge.batch(rows)
        keys = iter(judge.masks(rows, "attacker", steps * settings.eot).chunk(steps, dim=1))
        with crafting(denoiser, classifier):
            objective = expected_cross_entropy(lambda x: logits(x, next(keys)), labels, settings.eot)
            start = judge.threat.start(images, judge.start(rows))
            adversarial = ascend(objective, start, images, judge.threat, steps, judge.step_size)
            with torch.no_grad():
                return torch.cat([over_draws(images, labels, rows), over_draws(adversarial, labels, rows)], dim=1)

    pgd_facts = {"epsilon": config.attack.epsilon, "steps": steps, "step_size": judge.step_size}
    said(f"evaluation: {len(split)} test images, {attack} on the bare target")
    alone = judge.collect(bare)
    said(f"evaluation: {attack} on the defence, masks fixed and known")
    known = judge.collect(fixed)
    said(f"evaluation: {attack} on the defence, fresh masks, EOT {settings.eot}")
    anew = judge.collect(fresh, passes=settings.eot)
    return [
        _result("none", "natural", "none", alone[:, :1]),
        _result("none", attack, "none", alone[:, 1:2], **pgd_facts),
        _result("dir", "natural", "fixed", known[:, :1]),
        _result("dir", "natural", "fresh", anew[:, :draws]),
        _result("dir", attack, "fixed", known[:, 1:], **pgd_facts),
        _result("dir", attack, "fresh", anew[:, draws:], eot=settings.eot, **pgd_facts),
        _result("dir", f"transfer-{attack}", "fresh", alone[:, 2:], **pgd_facts),
    ]


def _result(defense: str, attack: str, masks: str, right: Tensor, **facts: Any) -> Result:
    correct, total = int(right[:, 0].sum()), len(right)
    return Result(
        defense,
        attack,
        masks,
        correct,
        total,
        wilson_interval(correct, total),
        draws=right.shape[1],
        mean=right.double().mean().item(),
        always=right.all(dim=1).double().mean().item(),
        **facts,
    )


def to_plain(results: list[Result]) -> list[dict[str, Any]]:
    """Rows for JSON."""
    return [{**asdict(row), "interval": list(row.interval)} for row in results]
