"""What recipes of denoisers before a frozen target share: their samples, and their adversarially trained form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.attacks.crafting import craft
from dircluster.attacks.gradient import cross_entropy, pgd
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig, ConfigError, RunConfig
from dircluster.defenses.base import Defended, Purifier
from dircluster.defenses.recipe import Batch, Recipe, freeze
from dircluster.defenses.stage import Modules, Stage
from dircluster.models.modules import frozen, under_attack
from dircluster.presets.compared import AdversarialConfig
from dircluster.rng import Stream


class DenoiserRecipe(Recipe):
    """Trains a denoiser on natural images and on attacks; the target is frozen in eval mode.

    The attacks are on the target alone; with ``adversarial`` they are on the whole pipeline, crafted again every batch,
    and the loss is the recipe's own or cross-entropy, as that says. A ``natural`` share of the images is not attacked.
    """

    trained: tuple[str, ...] = ("purifier",)

    def __init__(
        self,
        purifier: nn.Module,
        classifier: nn.Module,
        attack: AttackConfig,
        natural: float,
        adversarial: AdversarialConfig | None = None,
    ) -> None:
        super().__init__()
        self.purifier = purifier
        self.classifier = freeze(classifier)
        self.threat, self.natural, self.adversarial = attack, natural, adversarial
        self.attacks_deployed = adversarial is not None

    @property
    def capturable(self) -> bool:
        return self.adversarial is None or self.threat.pipeline_every == 1  # else steps differ

    def train(self, mode: bool = True) -> DenoiserRecipe:
        super().train(mode)
        self.classifier.eval()
        return self

    @property
    def by_labels(self) -> bool:
        """Whether the loss is cross-entropy alone."""
        return self.adversarial is not None and self.adversarial.objective == "ce"

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The start of PGD, and a number in [0, 1) an image that decides whether it stays natural."""
        return {"pgd": stream.uniform("pgd", shape), "natural": stream.uniform("natural", ())}

    def attack(self, batch: Batch) -> Batch:
        """Attacks on all but the images that stay natural.

        All images are attacked, so that the shapes of a step do not depend on what it draws.
        """
        with under_attack(self.purifier, self.classifier):
            if self.adversarial is None:
                found = self.on_target(batch)
            else:
                objective, start = cross_entropy(self.classifier, batch.labels), batch.draws["pgd"]
                found = craft(self.purifier, objective, batch.images, self.threat, start, batch.number)
        natural = batch.draws["natural"] < self.natural
        return replace(batch, adversarial=torch.where(natural[:, None, None, None], batch.images, found))

    def gauged(self, batch: Batch) -> Batch:
        batch = super().gauged(batch)
        draws = {name: torch.ones_like(value) if name == "natural" else value for name, value in batch.draws.items()}
        return replace(batch, draws=draws)

    def on_target(self, batch: Batch) -> Tensor:
        """PGD on the target alone: -> (N, C, H, W)."""
        threat, config = threat_of(self.threat), self.threat
        start = batch.draws["pgd"]
        return pgd(self.classifier, batch.images, batch.labels, threat, config.steps, config.step, start)

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """The recipe's own terms; or cross-entropy of h(g(x')) with the labels alone."""
        if not self.by_labels:
            return self.compare(batch, update)
        loss = F.cross_entropy(self.classifier(self.purifier(batch.attacked)).float(), batch.labels)
        return {"loss": loss, "class": loss}

    def compare(self, batch: Batch, update: int) -> dict[str, Tensor]:
        """The recipe's own loss terms of an update on an attacked batch."""
        raise NotImplementedError

    def deployed(self) -> nn.Module:
        assert isinstance(self.purifier, Purifier)
        return Defended(self.purifier, self.classifier)


class GanRecipe(DenoiserRecipe):
    """A denoiser with a discriminator, which is taught first in a step; then the denoiser, so many times.

    Under cross-entropy alone the discriminator is left as it is.
    """

    def __init__(
        self,
        purifier: nn.Module,
        discriminator: nn.Module,
        classifier: nn.Module,
        attack: AttackConfig,
        natural: float,
        adversarial: AdversarialConfig | None = None,
        denoiser_steps: int = 1,
    ) -> None:
        super().__init__(purifier, classifier, attack, natural, adversarial)
        self.discriminator = discriminator if not self.by_labels else freeze(discriminator)
        self.denoiser_steps = denoiser_steps
        self.trained = ("purifier",) if self.by_labels else ("purifier", "discriminator")

    @property
    def updates(self) -> tuple[tuple[str, ...], ...]:
        return (("purifier",),) if self.by_labels else (("discriminator",), *[("purifier",)] * self.denoiser_steps)

    def compare(self, batch: Batch, update: int) -> dict[str, Tensor]:
        if update > 0:
            with frozen(self.discriminator):
                return self.teach_denoiser(batch, self.purifier(batch.attacked))
        with torch.no_grad():
            restored = self.purifier(batch.attacked)
        loss = self.teach_discriminator(batch.images, restored)
        return {"loss": loss, "discriminator": loss}

    def teach_discriminator(self, images: Tensor, restored: Tensor) -> Tensor:
        """Its loss on natural and restored images, (N, C, H, W) each: -> ()."""
        raise NotImplementedError

    def teach_denoiser(self, batch: Batch, restored: Tensor) -> dict[str, Tensor]:
        """The denoiser's terms, given what it makes of the attacked images (N, C, H, W)."""
        raise NotImplementedError


def real_or_not(logits: Tensor, real: bool) -> Tensor:
    """Mean cross-entropy of logits (N,) with one answer for all: -> ()."""
    wanted = torch.full_like(logits, float(real), dtype=torch.float32)
    return F.binary_cross_entropy_with_logits(logits.float(), wanted)


def single_worker(run: RunConfig) -> None:
    """Raise ConfigError where several workers are to share a step of several updates."""
    if run.scaling.most > 1:
        raise ConfigError(
            f"scaling.workers must be 1 to train {run.defense}, got {run.scaling.workers}: a step of it has several"
            " updates, which one worker makes"
        )


def trained_on(plain: Stage, make: Callable[[Modules], Recipe], run: Any) -> Stage:
    """The stage after ``plain``, NAME_a: the same networks by ``run.adversarial``, on attacks on the pipeline."""
    trained = ("purifier",) if run.adversarial.objective == "ce" else tuple(plain.optimizers)
    return replace(
        plain,
        name=f"{plain.name}_a",
        recipe=make,
        epochs=run.adversarial.epochs,
        optimizers=dict.fromkeys(trained, run.adversarial.optimizer),
        sections=(*plain.sections, "adversarial"),
        passes=run.attack.pipeline_gradients + 1,
    )


def how_attacked(adversarial: AdversarialConfig | None) -> str:
    """For the model card: what it was trained against."""
    if adversarial is None:
        return "It is not trained against attacks on the whole pipeline."
    loss = "its own loss" if adversarial.objective == "own" else "cross-entropy alone"
    return (
        f"It was then trained on by {loss}, on attacks on the whole pipeline, for {adversarial.epochs} epochs: what\n"
        "the DIR paper (Section 4.3) calls adversarial training of a denoiser, without saying by which loss."
    )
