"""APE-GAN (Jin et al. 2019): a generator gives the image without its attack, judged by a discriminator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.config import AttackConfig
from dircluster.defenses.base import Purifier
from dircluster.defenses.denoiser import GanRecipe, how_attacked, real_or_not, single_worker, trained_on
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Defense, Modules, Stage
from dircluster.defenses.target import target_stage
from dircluster.models.apegan import Discriminator, Generator
from dircluster.presets.apegan import ApeganAdversarialRun, ApeganConfig, ApeganRun
from dircluster.presets.compared import AdversarialConfig


class GeneratorPurifier(Generator, Purifier):
    """g of the paper. It draws nothing; in eval mode it normalizes by running statistics, where the authors' code takes
    those of the batch, so that an image's result would depend on what else is in it."""

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return super().forward(images)


class ApeganRecipe(GanRecipe):
    """Trains the generator by its distance to natural images and by what the discriminator takes for one."""

    def __init__(
        self,
        purifier: nn.Module,
        discriminator: nn.Module,
        classifier: nn.Module,
        config: ApeganConfig,
        attack: AttackConfig,
        adversarial: AdversarialConfig | None = None,
    ) -> None:
        steps = config.generator_steps
        super().__init__(purifier, discriminator, classifier, attack, config.natural, adversarial, steps)
        self.config = config

    def teach_discriminator(self, images: Tensor, restored: Tensor) -> Tensor:
        """Cross-entropy with what they are, natural and restored ones in passes of their own."""
        return real_or_not(self.discriminator(images), True) + real_or_not(self.discriminator(restored), False)

    def teach_denoiser(self, batch: Batch, restored: Tensor) -> dict[str, Tensor]:
        """0.7 times the root of the mean square difference in [-1, 1], and 0.3 times the cross-entropy of D with real.

        The root is that of a whole micro-batch: with several of them the loss is the mean of theirs.
        """
        square = F.mse_loss(2 * restored.float(), 2 * batch.images)
        content = torch.sqrt(square) if self.config.content == "rmse" else square
        fooling = real_or_not(self.discriminator(restored), True)
        loss = self.config.content_weight * content + self.config.adversarial_weight * fooling
        return {"loss": loss, "content": content, "fooling": fooling}


def _recipe(run: ApeganRun, adversarial: AdversarialConfig | None = None) -> Callable[[Modules], Recipe]:
    return lambda modules: ApeganRecipe(
        modules["purifier"], modules["discriminator"], modules["classifier"], run.apegan, run.attack, adversarial
    )


def stages(run: ApeganRun) -> tuple[Stage, ...]:
    """Target and APE-GAN."""
    single_worker(run)
    trained = Stage(
        "apegan",
        _recipe(run),
        run.apegan.epochs,
        {"purifier": run.apegan.optimizer, "discriminator": run.apegan.optimizer},
        sections=("model", "apegan"),
        stored=("purifier", "discriminator", "classifier"),
        keep=run.apegan.keep,
    )
    return (target_stage(run), trained)


def adversarial_stages(run: ApeganAdversarialRun) -> tuple[Stage, ...]:
    """Target, APE-GAN, and APE-GAN against attacks on the pipeline."""
    target, plain = stages(run)
    return (target, plain, trained_on(plain, _recipe(run, run.adversarial), run))


def describe(run: ApeganRun) -> str:
    """For the model card."""
    config, adversarial = run.apegan, run.adversarial if isinstance(run, ApeganAdversarialRun) else None
    return (
        "APE-GAN in front of a classifier (Jin et al. 2019, arXiv 1707.05474): a generator makes each image again, by\n"
        f"{config.content_weight:g} {config.content.upper()} to the natural one and {config.adversarial_weight:g} of a"
        f" discriminator's cross-entropy.\n{how_attacked(adversarial)}\n"
        "Broken: Carlini and Wagner 2017 (arXiv 1711.08478) pass their L2 attack through it. A comment in their code\n"
        "has a mean distortion of 1.45 on CIFAR-10, where 0.85 does for the bare classifier. The DIR paper prints\n"
        "28.7 % under PGD-20 and 12.9 % under AutoAttack, where its bare target has 45.7 % and 42.3 %: PGD-20 had not\n"
        "converged."
    )


DEFENSE = Defense(
    name="apegan",
    run=ApeganRun,
    modules=lambda run: {
        "purifier": lambda: GeneratorPurifier(run.data.channels, run.model.features),
        "discriminator": lambda: Discriminator(run.data.channels, run.data.height, run.data.width, run.model.features),
    },
    stages=stages,
    describe=describe,
    sections=("model",),
)
ADVERSARIAL = replace(DEFENSE, name="apegan_a", run=ApeganAdversarialRun, stages=adversarial_stages)
