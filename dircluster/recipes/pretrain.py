"""Stage 1, pre-training (Eq. 2): restore natural images, from natural samples and from ones that fool the target."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig, MaskingConfig
from dircluster.models.denoiser import MaskedDenoiser
from dircluster.models.masking import windows
from dircluster.recipes.base import Batch, Recipe, crafting


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
        with crafting(self.classifier):
            adversarial = pgd(
                self.classifier, images, batch.labels, threat_of(attack), attack.steps, attack.step, uniform
            )
        kept = windows(batch.stream.permutations("masks", self.denoiser.tokens), self.masking)
        return replace(batch, adversarial=adversarial, kept=kept)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 2 as a mean over masks, images and pixels, for natural and adversarial samples alike."""
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
