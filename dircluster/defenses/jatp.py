"""JATP (Zhou et al. 2021, arXiv 2106.05453), our reconstruction: adversarial training of a denoiser in feature space.

Its text and code were not to be had. Verified are these: samples are full attacks on h(g(x)) (attack.crafting pgd),
found in a feature space, where the risk is a feature similarity; g alone learns; a pixel-wise loss is added. Layer,
similarity, weights and network are this package's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.attacks.crafting import craft
from dircluster.config import AttackConfig, ConfigError
from dircluster.defenses import hgd
from dircluster.defenses.denoiser import DenoiserRecipe
from dircluster.defenses.recipe import Batch
from dircluster.defenses.stage import Stage
from dircluster.defenses.target import target_stage
from dircluster.models.classifiers import last_map, pooled
from dircluster.models.modules import under_attack
from dircluster.presets.jatp import JatpConfig, JatpRun
from dircluster.rng import Stream


def _features(classifier: nn.Module, config: JatpConfig) -> Callable[[Tensor], Tensor]:
    """What of the target's passes is compared. Raises ConfigError."""
    if config.layer == "logits":
        return lambda images: classifier(images)
    try:
        return (pooled if config.layer == "pooled" else last_map)(classifier)
    except ConfigError as error:
        raise ConfigError(f"{error}; use jatp.layer logits") from error


class JatpRecipe(DenoiserRecipe):
    """Trains the U-net to keep the target's features against attacks that move them, through g and h."""

    def __init__(self, purifier: nn.Module, classifier: nn.Module, config: JatpConfig, attack: AttackConfig) -> None:
        super().__init__(purifier, classifier, attack, natural=0.0)
        self.config, self.attacks_deployed = config, True
        self.features = _features(classifier, config)

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The random start: where g is near the identity the loss is least at the image, and has no gradient there."""
        return {"pgd": stream.uniform("pgd", shape)}

    @property
    def capturable(self) -> bool:
        return self.threat.pipeline_every == 1  # else steps differ

    def attack(self, batch: Batch) -> Batch:
        """By ``attack.crafting``, on the very similarity that the loss is made of; no labels."""
        images = batch.images
        with under_attack(self.purifier, self.classifier):
            with torch.no_grad():
                reference = self.features(images)

            def objective(restored: Tensor) -> Tensor:
                return self.apart(restored, reference)

            found = craft(self.purifier, objective, images, self.threat, batch.draws["pgd"], batch.number)
        return replace(batch, adversarial=found)

    def apart(self, restored: Tensor, reference: Tensor) -> Tensor:
        """How far the features of images (N, C, H, W) lie from ``reference`` (N, ...): -> (N,)."""
        ours, theirs = self.features(restored).float().flatten(1), reference.float().flatten(1)
        if self.config.similarity == "cosine":
            return 1 - F.cosine_similarity(ours, theirs)
        return (ours - theirs).square().mean(dim=1)

    def compare(self, batch: Batch, update: int) -> dict[str, Tensor]:
        """The mean of S(f(g(x')), f(x)), f the target's features, and the mean squared difference of g(x') and x."""
        config, images = self.config, batch.images
        restored = self.purifier(batch.attacked)
        with torch.no_grad():
            reference = self.features(images)
            hard = torch.ones(len(images), device=images.device)
            if config.hard_weight > 0:
                true = self.classifier(images).float().softmax(dim=1).gather(1, batch.labels[:, None])[:, 0]
                hard = 1 - config.hard_weight * true
        feature = (hard * self.apart(restored, reference)).mean()
        pixel = F.mse_loss(restored.float(), images)
        return {"loss": feature + config.pixel_weight * pixel, "feature": feature, "pixel": pixel}


def stages(run: JatpRun) -> tuple[Stage, ...]:
    """Target and JATP."""
    trained = Stage(
        "jatp",
        lambda modules: JatpRecipe(modules["purifier"], modules["classifier"], run.jatp, run.attack),
        run.jatp.epochs,
        {"purifier": run.jatp.optimizer},
        sections=("model", "jatp"),
        stored=("purifier", "classifier"),
        passes=run.attack.pipeline_gradients + 1,
    )
    return (target_stage(run), trained)


def describe(run: JatpRun) -> str:
    """For the model card."""
    return (
        "Joint adversarial training of pre-processing (JATP; Zhou et al. 2021, arXiv 2106.05453): our reconstruction;\n"
        f"no code, text not available. A U-net with stages of {', '.join(map(str, run.model.widths))} channels is\n"
        f"trained against attacks on the whole pipeline that move the target's features ({run.jatp.layer},"
        f" {run.jatp.similarity}).\n"
        "Broken: no attack on it is published. The DIR paper prints 44.2 % under PGD-20 and 40.3 % under AutoAttack,\n"
        "where its bare target has 45.7 % and 42.3 %, and 26.8 % under the attack on restored images: judge it\n"
        "against the identity."
    )


DEFENSE = replace(hgd.DEFENSE, name="jatp", run=JatpRun, stages=stages, describe=describe)
