"""DIR (Zhou et al., ICML 2023): pre-training (Eq. 2), then the game of Algorithm 1."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.attacks.gradient import kl_divergence, pgd
from dircluster.attacks.restored import perturbation
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig, DirConfig, MaskingConfig
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.models.masked_vit import MaskedDenoiser
from dircluster.models.masking import complementary_masks
from dircluster.models.modules import under_attack


class PretrainRecipe(Recipe):
    """Trains the denoiser alone; the target is frozen and never sees a restored image."""

    trained = ("denoiser",)
    restores = True

    def __init__(
        self, denoiser: MaskedDenoiser, classifier: nn.Module, masking: MaskingConfig, attack: AttackConfig
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.classifier = classifier.requires_grad_(False).eval()
        self.masking = masking
        self.attack = attack

    def train(self, mode: bool = True) -> PretrainRecipe:
        super().train(mode)
        self.classifier.eval()
        return self

    def craft(self, batch: Batch) -> Batch:
        """PGD against the target alone, and the masks of Eq. 2."""
        images, attack = batch.images, self.attack
        uniform = batch.stream.uniform("pgd", tuple(images.shape[1:]))
        with under_attack(self.classifier):
            adversarial = pgd(
                self.classifier, images, batch.labels, threat_of(attack), attack.steps, attack.step, uniform
            )
        kept = complementary_masks(batch.stream.permutations("masks", self.denoiser.tokens), self.masking)
        return replace(batch, adversarial=adversarial, kept=kept)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 2 as a mean over masks, images and pixels, for natural and adversarial samples together."""
        assert batch.adversarial is not None, "craft before forward"
        assert batch.kept is not None
        both = torch.cat([batch.images, batch.adversarial])
        restored = self.denoiser.restore_each(both, batch.kept.repeat(1, 2, 1))
        errors = (restored - batch.images.repeat(2, 1, 1, 1)).square().mean(dim=(0, 2, 3, 4))
        natural, adversarial = errors.chunk(2)
        return {"loss": errors.mean(), "natural": natural.mean(), "adversarial": adversarial.mean()}

    def predict(self, images: Tensor, kept: Tensor | None) -> Tensor:
        assert kept is not None
        logits: Tensor = self.classifier(self.restore(images, kept))
        return logits

    def restore(self, images: Tensor, kept: Tensor) -> Tensor:
        restored: Tensor = self.denoiser(images, kept)
        return restored


class DirRecipe(Recipe):
    """Trains the denoiser against attacks on the whole pipeline, and on its own restorations (Eq. 7).

    The target is frozen in eval mode, unless ``config.joint``, where it learns together with the denoiser.
    """

    restores = True

    def __init__(
        self,
        denoiser: MaskedDenoiser,
        classifier: nn.Module,
        config: DirConfig,
        masking: MaskingConfig,
        attack: AttackConfig,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.classifier = classifier if config.joint else classifier.requires_grad_(False).eval()
        self.config = config
        self.masking = masking
        self.attack = attack
        self.trained = ("denoiser", "classifier") if config.joint else ("denoiser",)

    def train(self, mode: bool = True) -> DirRecipe:
        super().train(mode)
        if not self.config.joint:
            self.classifier.eval()
        return self

    def craft(self, batch: Batch) -> Batch:
        """Masks, and PGD on h(g(.)) under them (lines 4 and 5 of Algorithm 1)."""
        images, attack = batch.images, self.attack
        kept = self._masks(batch, 0)
        steps_done = 0

        def pipeline(candidates: Tensor) -> Tensor:
            nonlocal steps_done
            steps_done += 1
            fresh = self.config.crafting_masks == "fresh"
            return self.predict(candidates, self._masks(batch, steps_done) if fresh else kept)

        uniform = batch.stream.uniform("pgd", tuple(images.shape[1:]))
        with under_attack(self.denoiser, self.classifier):
            adversarial = pgd(pipeline, images, batch.labels, threat_of(attack), attack.steps, attack.step, uniform)
        return replace(batch, adversarial=adversarial, kept=kept)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Lines 7 to 10: the loss terms, with gradient through restored images and constant perturbations."""
        assert batch.adversarial is not None, "craft before forward"
        assert batch.kept is not None
        restored = self.restore(batch.adversarial, batch.kept)
        logits = self.classifier(restored)
        return self.compare(batch, restored, logits, self.perturb(batch, restored.detach(), logits.detach()))

    def perturb(self, batch: Batch, restored: Tensor, logits: Tensor) -> Tensor:
        """delta of Eq. 4 on restored images (N, C, H, W), given their logits: -> (N, C, H, W)."""
        normal = batch.stream.normal("perturbation", tuple(restored.shape[1:]))
        with under_attack(self.classifier):
            if self.config.joint:  # the logits at hand were made with batch statistics, which crafting does not use
                with torch.no_grad():
                    logits = self.classifier(restored)
            steps = self.config.perturb_steps
            step_size = self.attack.step_for(steps)
            return perturbation(self.classifier, restored, logits, threat_of(self.attack), steps, step_size, normal)

    def compare(self, batch: Batch, restored: Tensor, logits: Tensor, delta: Tensor) -> dict[str, Tensor]:
        """Eq. 5 to 7: adversarial (L_adv), representation (L_rep), and their sum; mse where it is asked for."""
        adversarial = F.cross_entropy(logits.float(), batch.labels)
        representation = kl_divergence(logits, self.classifier(restored + delta)).mean()
        loss = adversarial + self.config.alpha * representation
        terms = {"adversarial": adversarial, "representation": representation}
        if self.config.mse_weight > 0:
            terms["mse"] = F.mse_loss(restored, batch.images)
            loss = loss + self.config.mse_weight * terms["mse"]
        return {"loss": loss, **terms}

    def predict(self, images: Tensor, kept: Tensor | None) -> Tensor:
        assert kept is not None
        logits: Tensor = self.classifier(self.restore(images, kept))
        return logits

    def restore(self, images: Tensor, kept: Tensor) -> Tensor:
        restored: Tensor = self.denoiser(images, kept)
        return restored

    def _masks(self, batch: Batch, draw: int) -> Tensor:
        purpose = "masks" if draw == 0 else f"masks/{draw}"
        return complementary_masks(batch.stream.permutations(purpose, self.denoiser.tokens), self.masking)
