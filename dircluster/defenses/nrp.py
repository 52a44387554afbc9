"""NRP (Naseer et al., CVPR 2020): a purifier learns what keeps features and looks natural to a critic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.attacks.gradient import projected_ascent, value_and_grad
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig, ConfigError
from dircluster.defenses.base import Purifier
from dircluster.defenses.denoiser import GanRecipe, how_attacked, real_or_not, single_worker, trained_on
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Defense, Modules, Stage
from dircluster.defenses.target import target_stage
from dircluster.models.classifiers import half_map, last_map
from dircluster.models.nrp import Critic, NRPNet
from dircluster.presets.compared import AdversarialConfig
from dircluster.presets.nrp import NrpAdversarialRun, NrpConfig, NrpRun
from dircluster.rng import Stream


class NrpPurifier(NRPNet, Purifier):
    """g of the paper. It draws nothing. ``clamp`` cuts what it makes to [0, 1] in eval mode, that of crafting too."""

    def __init__(self, channels: int = 3, *, clamp: bool = False, **network: Any) -> None:
        super().__init__(channels, **network)
        self.clamp = clamp

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        restored = super().forward(images)
        return restored.clamp(0, 1) if self.clamp and not self.training else restored


def relativistic(higher: Tensor, lower: Tensor) -> Tensor:
    """Relativistic average loss (Jolicoeur-Martineau 2018) of scores (N,) that are to be higher than the others: -> ().

    Half the cross-entropy of each score, less the mean of the other kind's, with what it is to be.
    """
    return (real_or_not(higher - lower.mean(), True) + real_or_not(lower - higher.mean(), False)) / 2


def _features(classifier: nn.Module, config: NrpConfig) -> Callable[[Tensor], Tensor]:
    """The target's feature map that is compared. Raises ConfigError."""
    if config.layer == "last":
        return last_map(classifier)
    try:
        return half_map(classifier)
    except ConfigError as error:
        raise ConfigError(f"{error}; use nrp.layer last") from error


class NrpRecipe(GanRecipe):
    """Trains the purifier by the target's features, by pixels and by a relativistic critic."""

    def __init__(
        self,
        purifier: nn.Module,
        discriminator: nn.Module,
        classifier: nn.Module,
        config: NrpConfig,
        attack: AttackConfig,
        adversarial: AdversarialConfig | None = None,
    ) -> None:
        super().__init__(purifier, discriminator, classifier, attack, config.natural, adversarial)
        self.config = config
        self.features = _features(classifier, config)

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Those of every denoiser, and the noise that the self-supervised attack starts from."""
        found = super().draws(stream, shape)
        return found | {"ssp": stream.normal("ssp", shape)} if self.config.samples == "ssp" else found

    def on_target(self, batch: Batch) -> Tensor:
        """PGD on the target; or steps that take its features away from the natural image's, from clipped noise."""
        if self.config.samples == "target":
            return super().on_target(batch)
        threat, config = threat_of(self.threat), self.threat
        with torch.no_grad():
            reference = self.features(batch.images)

        def distance(candidates: Tensor) -> Tensor:
            return (self.features(candidates) - reference).float().square().flatten(1).mean(dim=1)

        start = threat.project(batch.draws["ssp"], batch.images)
        return projected_ascent(value_and_grad(distance), start, batch.images, threat, config.steps, config.step)

    def teach_discriminator(self, images: Tensor, restored: Tensor) -> Tensor:
        """Natural images are to score higher than the mean restored one."""
        return relativistic(self.discriminator(images), self.discriminator(restored))

    def teach_denoiser(self, batch: Batch, restored: Tensor) -> dict[str, Tensor]:
        """Features, pixels, and restored images that are to score higher than the mean natural one."""
        config, images = self.config, batch.images
        with torch.no_grad():
            reference = self.features(images)
        apart = F.l1_loss if config.distance == "mae" else F.mse_loss
        feature = apart(self.features(restored).float(), reference.float())
        image = F.mse_loss(restored.float(), images)
        fooling = relativistic(self.discriminator(restored), self.discriminator(images))
        loss = config.feature_weight * feature + config.image_weight * image + config.adversarial_weight * fooling
        return {"loss": loss, "feature": feature, "image": image, "fooling": fooling}


def _recipe(run: NrpRun, adversarial: AdversarialConfig | None = None) -> Callable[[Modules], Recipe]:
    return lambda modules: NrpRecipe(
        modules["purifier"], modules["discriminator"], modules["classifier"], run.nrp, run.attack, adversarial
    )


def stages(run: NrpRun) -> tuple[Stage, ...]:
    """Target and NRP."""
    single_worker(run)
    trained = Stage(
        "nrp",
        _recipe(run),
        run.nrp.epochs,
        {"purifier": run.nrp.optimizer, "discriminator": run.nrp.optimizer},
        sections=("model", "nrp"),
        stored=("purifier", "discriminator", "classifier"),
    )
    return (target_stage(run), trained)


def adversarial_stages(run: NrpAdversarialRun) -> tuple[Stage, ...]:
    """Target, NRP, and NRP against attacks on the pipeline."""
    target, plain = stages(run)
    return (target, plain, trained_on(plain, _recipe(run, run.adversarial), run))


def describe(run: NrpRun) -> str:
    """For the model card."""
    adversarial = run.adversarial if isinstance(run, NrpAdversarialRun) else None
    return (
        "Neural representation purifier in front of a classifier (NRP; Naseer et al., CVPR 2020): a network without a\n"
        "way around it makes each image again, by features, pixels and a relativistic critic. The features are those\n"
        f"of the target's {run.nrp.layer} map, where the paper takes a VGG-16 of ImageNet; its training code is not\n"
        f"public. Purifier: {run.model.blocks} {run.model.network} blocks of {run.model.features} channels.\n"
        f"{how_attacked(adversarial)}\n"
        "Broken: the authors' README concedes that white-box access breaks it (bypass_nrp.py: targeted PGD-10 at\n"
        "16/255 through it, on ImageNet, without a number). The DIR paper prints 21.9 % under PGD-20, where its bare\n"
        "target has 45.7 %."
    )


DEFENSE = Defense(
    name="nrp",
    run=NrpRun,
    modules=lambda run: {
        "purifier": lambda: NrpPurifier(
            run.data.channels,
            features=run.model.features,
            growth=run.model.growth,
            blocks=run.model.blocks,
            network=run.model.network,
            clamp=run.model.clamp,
        ),
        "discriminator": lambda: Critic(run.data.channels, run.data.height, run.data.width, run.model.critic_features),
    },
    stages=stages,
    describe=describe,
    sections=("model",),
)
ADVERSARIAL = replace(DEFENSE, name="nrp_a", run=NrpAdversarialRun, stages=adversarial_stages)
