"""The defended pipeline h(g(x)) as one module: images in [0, 1] in, logits out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import MaskingConfig
from dircluster.models import masking
from dircluster.models.masked_vit import MaskedDenoiser


class DefendedClassifier(nn.Module):
    """Masked, restored, classified. A new module draws fresh masks at every call.

    :meth:`fresh` and :meth:`fixed` give views of it that draw otherwise: modules of their own with the same weights and
    submodules. They change nothing of the module that they are asked of. ``draws`` > 1 averages the logits over so many
    mask draws.
    """

    def __init__(self, denoiser: MaskedDenoiser, classifier: nn.Module, config: MaskingConfig) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.classifier = classifier
        self.masking = config
        self.draws = 1
        self._seed: int | None = None
        self._generator = torch.Generator()
        self._generator.seed()

    def fresh(self, seed: int | None = None, draws: int = 1) -> DefendedClassifier:
        """A view with new masks at each call, from a generator of its own, seeded from the system without ``seed``."""
        view = self._view(None, draws)
        if seed is None:
            view._generator.seed()
        else:
            view._generator = rng.generator(seed, "fresh_masks")
        return view

    def fixed(self, seed: int, draws: int = 1) -> DefendedClassifier:
        """A view with the same masks for every image and call: what an attacker faces who knows the masks."""
        return self._view(seed, draws)

    def _view(self, seed: int | None, draws: int) -> DefendedClassifier:
        view = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):  # what is registered with a view, such as a hook, is the view's
                vars(view)[name] = value.copy()
        view._seed, view.draws, view._generator = seed, draws, torch.Generator()
        return view

    @property
    def is_fixed(self) -> bool:
        """Whether every call uses the same masks."""
        return self._seed is not None

    def masks(self, images: int) -> Tensor:
        """The masks of the next call: -> (K, N, n) int64 on the CPU."""
        tokens = self.denoiser.tokens
        if self._seed is None:
            return masking.draw_masks(self._generator, images, tokens, self.masking)
        generator = rng.generator(self._seed, "fixed_masks")
        return masking.draw_masks(generator, 1, tokens, self.masking).expand(-1, images, -1)

    def restore(self, images: Tensor) -> Tensor:
        """x~ under the next masks: (N, C, H, W) -> (N, C, H, W), not clamped."""
        restored: Tensor = self.denoiser(images, self.masks(len(images)).to(images.device))
        return restored

    def logits(self, images: Tensor, kept: Tensor) -> Tensor:
        """Logits under given masks: (N, C, H, W), (K, N, n) -> (N, classes)."""
        logits: Tensor = self.classifier(self.denoiser(images, kept))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, classes), averaged over ``draws`` mask draws."""
        if self.draws == 1:
            return self.logits(images, self.masks(len(images)).to(images.device))
        if self._seed is None:
            kept = torch.cat([self.masks(len(images)) for _ in range(self.draws)], dim=1)
        else:
            sets = (
                masking.draw_masks(
                    rng.generator(self._seed, "fixed_masks", step=i), 1, self.denoiser.tokens, self.masking
                )
                for i in range(self.draws)
            )
            kept = torch.cat([s.expand(-1, len(images), -1) for s in sets], dim=1)
        repeated = images.repeat(self.draws, 1, 1, 1)
        return self.logits(repeated, kept.to(images.device)).view(self.draws, len(images), -1).mean(dim=0)
