"""EBM (Hill, Mitchell and Zhu, ICLR 2021): Langevin chains of a learned energy wash an attack out of an image, in front
of a naturally trained classifier that answers by the mean logits of several chains.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dircluster.attacks.expectation import straight_through
from dircluster.defenses.base import AdaptiveAttack, Purifier
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Defense, Modules, Stage
from dircluster.defenses.target import target_stage
from dircluster.models.energy import Energy, langevin, langevin_step
from dircluster.models.modules import under_attack
from dircluster.models.noise import counted_normal
from dircluster.presets.ebm import EbmConfig, EbmRun, EnergyConfig
from dircluster.rng import Stream

KEYS = 2**62
"""Keys of Langevin noise lie below."""
ENOUGH = 20
"""Chains that the full-gradient attack averages each gradient over (MEFA: Du, Hill and Cai 2026)."""


def langevin_keys(generator: torch.Generator, images: int) -> Tensor:
    """Keys of the noise of chains: -> (images,) int64, on the generator's device."""
    return torch.randint(KEYS, (images,), generator=generator, device=generator.device)


class LangevinPurifier(Purifier):
    """g of the paper: Langevin chains started at the image. A row of draws is the keys of a prediction's chains.

    The published energy is linear in pieces, so grad U is constant around almost every point, and the exact gradient of
    all steps is the identity: what BPDA passes on. It is passed on so, for nothing. Where the energy is smooth, the
    exact gradient leads through every step, each computed again in the backward pass. Nothing is clamped.
    """

    def __init__(self, config: EnergyConfig, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.config, self.replicates = config, config.replicates
        self.energy = Energy(channels, height, width, config.widths, smooth=config.activation == "silu")
        self.adaptive = (
            AdaptiveAttack("bpda", "identity", steps=50, eot=1),  # the authors', by the chains of a prediction
            AdaptiveAttack("full-gradient", "exact", steps=50, eot=-(-ENOUGH // config.replicates)),
        )

    def draw(self, generator: torch.Generator, images: int) -> Tensor:
        """Keys of the chains, those of a prediction in a row: -> (images, replicates) int64."""
        return langevin_keys(generator, images * self.config.replicates).view(images, -1)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """The ends of each image's first chain: (N, C, H, W), (N, replicates) int64 -> (N, C, H, W)."""
        assert draws is not None
        config, keys, start = self.config, draws[:, 0], 2 * images - 1
        if not (torch.is_grad_enabled() and start.requires_grad):
            return (langevin(self.energy, start, keys, config.steps, config.noise) + 1) / 2
        if not self.energy.smooth:
            made = langevin(self.energy, start, keys, config.steps, config.noise)
            return (straight_through(start, made) + 1) / 2
        reached: Any = start
        for step in range(config.steps):
            reached = checkpoint(self._step, reached, keys, step, use_reentrant=False)
        found: Tensor = (reached + 1) / 2
        return found

    def _step(self, reached: Tensor, keys: Tensor, step: int) -> Tensor:
        noise = counted_normal(keys, step, tuple(reached.shape[1:]))
        return langevin_step(self.energy, reached, noise, self.config.noise)

    @property
    def passes(self) -> int:
        """Passes of an image through the energy for a prediction, forward and backward."""
        return self.config.steps * self.config.replicates

    def extra_repr(self) -> str:
        return repr(self.config)


class Chains(nn.Module):
    """The persistent chains of training, (chains, C, H, W) in units of [-1, 1]: state, not weights."""

    reached: Tensor

    def __init__(self, chains: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("reached", 2 * torch.rand(chains, channels, height, width) - 1)


class EbmRecipe(Recipe):
    """Trains the energy by contrast between images and persistent chains; there is no classifier in it."""

    trained = ("purifier", "chains")
    alone = "keeps chains that lie with one worker"

    def __init__(self, purifier: LangevinPurifier, chains: Chains, config: EbmConfig) -> None:
        super().__init__()
        self.purifier, self.chains, self.config = purifier, chains, config

    @property
    def capturable(self) -> bool:
        return False  # the noise of a chain is counted in Python

    @property
    def updates(self) -> tuple[tuple[str, ...], ...]:
        """The energy alone has an optimizer."""
        return (("purifier",),)

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Noise on the images, the chains that a batch moves, no two of them the same, and the keys of their noise."""
        chains = stream.sample("chains", self._choose)
        keys = stream.sample("langevin", langevin_keys)
        assert chains is not None
        assert keys is not None
        return {"data_noise": stream.normal("data_noise", shape), "chains": chains, "langevin": keys}

    def _choose(self, generator: torch.Generator, images: int) -> Tensor:
        return torch.randperm(self.config.chains, generator=generator, device=generator.device)[:images]

    def attack(self, batch: Batch) -> Batch:
        """The chains go on: where they have got to is the batch's contrast to natural images."""
        bank, rows, noise = self.chains.reached, batch.draws["chains"], self.purifier.config.noise
        with under_attack(self.purifier):
            moved = langevin(self.purifier.energy, bank[rows], batch.draws["langevin"], self.config.steps, noise)
        bank[rows] = moved
        return replace(batch, adversarial=(moved + 1) / 2)

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """(mean U(x+) - mean U(x-)) / (noise^2 / 2): images with noise against chains, batch means."""
        images = 2 * batch.images - 1 + self.config.data_noise * batch.draws["data_noise"]
        data, chains = self.purifier.energy(torch.cat([images, 2 * batch.attacked - 1])).chunk(2)
        difference = data.mean() - chains.mean()
        return {"loss": difference / (self.purifier.config.noise**2 / 2), "energy_difference": difference}


def stages(run: EbmRun) -> tuple[Stage, ...]:
    """The target, the energy by Adam, and by plain SGD where the run has that stage.

    Each ends on its last weights: what a purification is worth is too dear to ask while training.
    """
    config = run.ebm

    def recipe(modules: Modules) -> Recipe:
        purifier, chains = modules["purifier"], modules["chains"]
        assert isinstance(purifier, LangevinPurifier)
        assert isinstance(chains, Chains)
        return EbmRecipe(purifier, chains, config)

    plan = [("ebm", config.epochs, config.optimizer)]
    if config.last_epochs:
        plan.append(("ebm_last", config.last_epochs, config.last_optimizer))
    made = [
        Stage(
            name,
            recipe,
            epochs,
            {"purifier": optimizer},
            sections=("model", "ebm"),
            stored=("purifier", "classifier") if name == plan[-1][0] else ("purifier", "chains"),
            keep="last",
            augments=False,
        )
        for name, epochs, optimizer in plan
    ]
    return (target_stage(run), *made)


def describe(run: EbmRun) -> str:
    """For the model card."""
    model, data = run.model, run.data
    published = EbmConfig()
    own = (model.steps, run.ebm.steps, run.ebm.chains, bool(run.ebm.last_epochs)) != (1500, 100, published.chains, True)
    short = "\nA short form for small budgets: these are not the published numbers." if own or data.height != 32 else ""
    return (
        f"Energy-based model as a Langevin purifier (EBM; Hill, Mitchell and Zhu, ICLR 2021): {model.steps} steps of"
        f" noise\n{model.noise:g} (in units of [-1, 1]) from each image, then a classifier trained by"
        f" {run.target.objective}; a prediction is\nthe mean of the logits of {model.replicates} chains.{short}\n"
        "Broken: published as 84.12 % natural and 54.90 % under BPDA with EOT (CIFAR-10, 8/255, WRN-28-10);\n"
        "exact gradients of all steps with EOT 20 are reported to leave 6.08 % (MEFA: Du, Hill and Cai 2026,\n"
        "arXiv 2605.06357, 510 images). For the published energy, linear in pieces, the exact gradient of a chain\n"
        "is the identity almost everywhere, which is what BPDA passes on too. The DIR paper prints 51.43 %\n"
        "(Table 3) beside DIR over an adversarially trained classifier: the two do not compare like with like."
    )


def facts(run: EbmRun) -> list[tuple[str, str]]:
    """For --dry-run."""
    chains = f"{run.model.replicates} a prediction, {run.model.steps} steps each; {run.ebm.chains:,} persistent ones"
    return [("chains", chains)]


DEFENSE = Defense(
    name="ebm",
    run=EbmRun,
    modules=lambda run: {
        "purifier": lambda: LangevinPurifier(run.model, run.data.channels, run.data.height, run.data.width),
        "chains": lambda: Chains(run.ebm.chains, run.data.channels, run.data.height, run.data.width),
    },
    stages=stages,
    describe=describe,
    facts=facts,
    sections=("model",),
    repeats="model.steps",
)
