"""HGD (Liao et al., CVPR 2018): a U-net restores an image, guided by what the target makes of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.config import AttackConfig, ConfigError
from dircluster.defenses.base import Purifier
from dircluster.defenses.denoiser import DenoiserRecipe, how_attacked, trained_on
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Defense, Modules, Stage
from dircluster.defenses.target import target_stage
from dircluster.models.classifiers import last_map
from dircluster.models.unet import DUNet
from dircluster.presets.compared import AdversarialConfig
from dircluster.presets.hgd import Guidance, HgdAdversarialRun, HgdConfig, HgdRun


class UNetPurifier(DUNet, Purifier):
    """g of the paper, x + U(x). It draws nothing; in eval mode an image's result does not depend on its batch."""

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return super().forward(images)


def _guide(classifier: nn.Module, guidance: Guidance) -> Callable[[Tensor], Tensor]:
    """What of the target's passes guides: its last feature map, or its logits. Raises ConfigError."""
    if guidance != "feature":
        return lambda images: classifier(images)
    try:
        return last_map(classifier)
    except ConfigError as error:
        raise ConfigError(f"{error}; use hgd.guidance logit") from error


class HgdRecipe(DenoiserRecipe):
    """Trains the U-net by what guides it."""

    def __init__(
        self,
        purifier: nn.Module,
        classifier: nn.Module,
        config: HgdConfig,
        attack: AttackConfig,
        adversarial: AdversarialConfig | None = None,
    ) -> None:
        super().__init__(purifier, classifier, attack, config.natural, adversarial)
        self.config = config
        self.guide = _guide(classifier, config.guidance)

    def compare(self, batch: Batch, update: int) -> dict[str, Tensor]:
        """The mean of |a(g(x')) - a(x)| over images and elements, a what guides; or cross-entropy for class."""
        guidance, restored = self.config.guidance, self.purifier(batch.attacked)
        if guidance == "class":
            loss = F.cross_entropy(self.guide(restored).float(), batch.labels)
        elif guidance == "pixel":
            loss = F.l1_loss(restored.float(), batch.images)
        else:
            with torch.no_grad():
                reference = self.guide(batch.images)
            loss = F.l1_loss(self.guide(restored).float(), reference.float())
        return {"loss": loss, guidance: loss}


def stages(run: HgdRun) -> tuple[Stage, ...]:
    """Target and HGD."""
    trained = Stage(
        "hgd",
        lambda modules: HgdRecipe(modules["purifier"], modules["classifier"], run.hgd, run.attack),
        run.hgd.epochs,
        {"purifier": run.hgd.optimizer},
        sections=("model", "hgd"),
        stored=("purifier", "classifier"),
    )
    return (target_stage(run), trained)


def adversarial_stages(run: HgdAdversarialRun) -> tuple[Stage, ...]:
    """Target, HGD, and HGD against attacks on the pipeline."""

    def recipe(modules: Modules) -> Recipe:
        return HgdRecipe(modules["purifier"], modules["classifier"], run.hgd, run.attack, run.adversarial)

    target, plain = stages(run)
    return (target, plain, trained_on(plain, recipe, run))


def describe(run: HgdRun) -> str:
    """For the model card."""
    adversarial = run.adversarial if isinstance(run, HgdAdversarialRun) else None
    return (
        f"High-level representation guided denoiser in front of a classifier (HGD; Liao et al., CVPR 2018): a U-net\n"
        f"adds to each image what undoes an attack on the classifier alone. Guided by: {run.hgd.guidance}.\n"
        f"Denoiser: stages of {', '.join(map(str, run.model.widths))} channels.\n{how_attacked(adversarial)}\n"
        "Broken: PGD through the denoiser reached the class it wanted for 100 % of images of ImageNet at 4/255\n"
        "(Athalye and Carlini 2018, arXiv 1804.03286). The DIR paper prints 18.1 % under PGD-20, where its bare\n"
        "target has 45.7 %."
    )


DEFENSE = Defense(
    name="hgd",
    run=HgdRun,
    modules=lambda run: {
        "purifier": lambda: UNetPurifier(
            run.data.channels, widths=run.model.widths, units=run.model.units, variant=run.model.variant
        )
    },
    stages=stages,
    describe=describe,
    sections=("model",),
)
ADVERSARIAL = replace(DEFENSE, name="hgd_a", run=HgdAdversarialRun, stages=adversarial_stages)
