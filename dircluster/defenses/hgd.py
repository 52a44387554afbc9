"""HGD (Liao et al., CVPR 2018): a U-net restores an image, guided by what the target makes of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig, ConfigError
from dircluster.defenses.base import Defended, Purifier
from dircluster.defenses.recipe import Batch, Recipe, freeze
from dircluster.defenses.stage import Defense, Stage
from dircluster.defenses.target import target_stage
from dircluster.models.classifiers import last_map
from dircluster.models.modules import under_attack
from dircluster.models.unet import DUNet
from dircluster.presets.hgd import Guidance, HgdConfig, HgdRun
from dircluster.rng import Stream


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


class HgdRecipe(Recipe):
    """Trains the U-net on natural images and on attacks on the target alone; the target is frozen in eval mode."""

    trained = ("purifier",)

    def __init__(self, purifier: nn.Module, classifier: nn.Module, config: HgdConfig, attack: AttackConfig) -> None:
        super().__init__()
        self.purifier = purifier
        self.classifier = freeze(classifier)
        self.config = config
        self.threat = attack
        self.guide = _guide(classifier, config.guidance)

    def train(self, mode: bool = True) -> HgdRecipe:
        super().train(mode)
        self.classifier.eval()
        return self

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The start of PGD, and a number in [0, 1) an image that decides whether it stays natural."""
        return {"pgd": stream.uniform("pgd", shape), "natural": stream.uniform("natural", ())}

    def attack(self, batch: Batch) -> Batch:
        """PGD against the target alone, but for the images that stay natural.

        All images are attacked, so that the shapes of a step do not depend on what it draws.
        """
        config = self.threat
        with under_attack(self.classifier):
            found = pgd(
                self.classifier,
                batch.images,
                batch.labels,
                threat_of(config),
                config.steps,
                config.step,
                batch.draws["pgd"],
            )
        natural = batch.draws["natural"] < self.config.natural
        return replace(batch, adversarial=torch.where(natural[:, None, None, None], batch.images, found))

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
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

    def deployed(self) -> nn.Module:
        assert isinstance(self.purifier, Purifier)
        return Defended(self.purifier, self.classifier)


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


def describe(run: HgdRun) -> str:
    """For the model card."""
    return (
        f"High-level representation guided denoiser in front of a classifier (HGD; Liao et al., CVPR 2018): a U-net\n"
        f"adds to each image what undoes an attack on the classifier alone. Guided by: {run.hgd.guidance}.\n"
        f"Denoiser: stages of {', '.join(map(str, run.model.widths))} channels. It is not trained against attacks on\n"
        "the whole pipeline."
    )


DEFENSE = Defense(
    name="hgd",
    run=HgdRun,
    modules=lambda run: {
        "purifier": lambda: UNetPurifier(
            run.data.channels,
            run.data.height,
            run.data.width,
            widths=run.model.widths,
            units=run.model.units,
            variant=run.model.variant,
        )
    },
    stages=stages,
    describe=describe,
    sections=("model",),
)
