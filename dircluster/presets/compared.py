"""What presets of several defenses share: the adversarially trained form of a denoiser, and the form on SVHN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dircluster.config import OptimizerConfig, require_positive
from dircluster.presets.base import AnyRun, short_rates

PIPELINE_CRAFTING = ("pgd", "target_first", "straight_through", "n_fgsm")
"""What ``attack.crafting`` may be where samples are crafted against a whole pipeline."""
ADAM = OptimizerConfig(name="adamw", lr=1e-3, beta2=0.999, weight_decay=0.0, milestones=(18, 27))
"""Adam, which is AdamW without decay. Its rate falls at 60 % and 90 % of 30 epochs."""


@dataclass(frozen=True)
class AdversarialConfig:
    """The stage after the plain one: the trained denoiser learns on, its samples crafted against h(g(x)) every batch.

    The images that stay natural are as many as before.
    """

    objective: Literal["own", "ce"] = "own"
    """own: the loss that the denoiser was trained by; ce: cross-entropy of h(g(x')) with the label alone."""
    epochs: int = 30
    """Passes over the training split."""
    optimizer: OptimizerConfig = ADAM
    """Of the denoiser, and of its discriminator where it has one."""

    def __post_init__(self) -> None:
        require_positive("adversarial", self, "epochs")


def short_adversarial(config: AdversarialConfig) -> AdversarialConfig:
    """The section for a smoke run."""
    return replace(config, epochs=2, optimizer=short_rates(config.optimizer))


def as_svhn(run: AnyRun) -> AnyRun:
    """A run on CIFAR-10 as one on SVHN, without flips: cifar10 -> svhn, cifar10_NAME -> svhn_NAME."""
    data = replace(run.data, name="svhn", flip=False)
    return replace(run, name=run.name.replace("cifar10", "svhn"), data=data)
