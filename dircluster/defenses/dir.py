"""DIR (Zhou et al., ICML 2023): pre-training (Eq. 2), then the game of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.attacks.crafting import craft
from dircluster.attacks.gradient import cross_entropy, kl_divergence, pgd
from dircluster.attacks.restored import perturbation
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig, TargetConfig
from dircluster.defenses.base import Defended, Purifier
from dircluster.defenses.recipe import Batch, Recipe, drawn, freeze
from dircluster.defenses.stage import Defense, Modules, Stage
from dircluster.defenses.target import mart_terms, target_stage
from dircluster.models.masked_vit import MaskedDenoiser
from dircluster.models.masking import complementary_masks, pixel_mask, random_permutations
from dircluster.models.modules import under_attack
from dircluster.presets.dir import DirConfig, DirRun, MaskingConfig, ModelConfig
from dircluster.rng import Stream


class MaskedPurifier(MaskedDenoiser, Purifier):
    """g of the paper: restored from what each complementary mask keeps, averaged. A draw permutes the patches."""

    forward_methods = ("restore_each",)

    def __init__(self, config: ModelConfig, masking: MaskingConfig, channels: int, height: int, width: int) -> None:
        super().__init__(config, channels, height, width)
        self.masking = masking

    def draw(self, generator: torch.Generator, images: int) -> Tensor:
        """Permutations of the patches, one an image: -> (images, T) int64."""
        return random_permutations(generator, images, self.tokens)

    def masks(self, draws: Tensor) -> Tensor:
        """Kept patches of each mask: permutations (N, T) -> (K, N, n) int64."""
        return complementary_masks(draws, self.masking)

    def pixel_masks(self, kept: Tensor) -> Tensor:
        """Masks (K, N, n) as images of ones and zeros, (K, N, 1, H, W)."""
        return pixel_mask(kept, self.height, self.width, self.config.patch)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """The restored image x~ of Eq. 5, the mean over the masks: (N, C, H, W), (N, T) -> (N, C, H, W)."""
        assert draws is not None
        return self.restore_each(images, self.masks(draws)).mean(dim=0)

    def visible(self, images: Tensor, draws: Tensor | None) -> Iterable[Tensor]:
        """The images under each mask."""
        assert draws is not None
        return (images * mask.to(images.device) for mask in self.pixel_masks(self.masks(draws)))

    @property
    def passes(self) -> int:
        """Passes of an image through the network."""
        return self.masking.masks

    def extra_repr(self) -> str:
        return repr(self.masking)


class PretrainRecipe(Recipe):
    """Trains the denoiser alone; the target is frozen and never sees a restored image."""

    trained = ("denoiser",)

    def __init__(self, denoiser: MaskedPurifier, classifier: nn.Module, attack: AttackConfig) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.classifier = freeze(classifier)
        self.threat = attack

    def train(self, mode: bool = True) -> PretrainRecipe:
        super().train(mode)
        self.classifier.eval()
        return self

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"pgd": stream.uniform("pgd", shape), **drawn(stream, "masks", self.denoiser)}

    def attack(self, batch: Batch) -> Batch:
        """PGD against the target alone."""
        threat, config = threat_of(self.threat), self.threat
        with under_attack(self.classifier):
            found = pgd(
                self.classifier, batch.images, batch.labels, threat, config.steps, config.step, batch.draws["pgd"]
            )
        return replace(batch, adversarial=found)

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """Eq. 2 as a mean over masks, images and pixels, for natural and adversarial samples together."""
        both = torch.cat([batch.images, batch.attacked])
        restored = self.denoiser.restore_each(both, self.denoiser.masks(batch.draws["masks"]).repeat(1, 2, 1))
        errors = (restored - batch.images.repeat(2, 1, 1, 1)).square().mean(dim=(0, 2, 3, 4))
        natural, adversarial = errors.chunk(2)
        return {"loss": errors.mean(), "natural": natural.mean(), "adversarial": adversarial.mean()}

    def deployed(self) -> nn.Module:
        return Defended(self.denoiser, self.classifier)


class DirRecipe(Recipe):
    """Trains the denoiser against attacks on the whole pipeline, and on its own restorations (Eq. 7).

    The target is frozen in eval mode, unless ``config.joint``, where it learns together with the denoiser.
    """

    attacks_deployed = True

    def __init__(
        self, denoiser: MaskedPurifier, classifier: nn.Module, config: DirConfig, attack: AttackConfig
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.classifier = classifier if config.joint else freeze(classifier)
        self.config = config
        self.threat = attack
        self.trained = ("denoiser", "classifier") if config.joint else ("denoiser",)
        self.renews_draws = config.crafting_masks == "fresh"

    @property
    def capturable(self) -> bool:
        return self.threat.pipeline_every == 1  # else steps differ

    def train(self, mode: bool = True) -> DirRecipe:
        super().train(mode)
        if not self.config.joint:
            self.classifier.eval()
        return self

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Start of PGD, permutations (those of crafting steps too where they are fresh), start of Eq. 4."""
        fresh = self.config.crafting_masks == "fresh"
        steps = range(1, self.threat.pipeline_gradients + 1) if fresh else ()
        made = {"pgd": stream.uniform("pgd", shape), "perturbation": stream.normal("perturbation", shape)}
        for purpose in ("masks", *(f"masks/{step}" for step in steps)):
            made |= drawn(stream, purpose, self.denoiser)
        return made

    def attack(self, batch: Batch) -> Batch:
        """Against h(g(.)) under the masks of the update, or under new ones at every step (line 5 of Algorithm 1)."""
        steps_done = 0

        def purify(candidates: Tensor) -> Tensor:
            nonlocal steps_done
            steps_done += 1
            fresh = self.config.crafting_masks == "fresh"
            restored: Tensor = self.denoiser(candidates, batch.draws[f"masks/{steps_done}" if fresh else "masks"])
            return restored

        with under_attack(self.denoiser, self.classifier):
            objective = cross_entropy(self.classifier, batch.labels)
            found = craft(purify, objective, batch.images, self.threat, batch.draws["pgd"], batch.number)
        return replace(batch, adversarial=found)

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """Lines 7 to 10: the loss terms, with gradient through restored images and constant perturbations."""
        restored = self.denoiser(batch.attacked, batch.draws["masks"])
        logits = self.classifier(restored)
        return self.compare(batch, restored, logits, self.perturb(batch, restored.detach(), logits.detach()))

    def perturb(self, batch: Batch, restored: Tensor, logits: Tensor) -> Tensor:
        """delta of Eq. 4 on restored images (N, C, H, W), given their logits: -> (N, C, H, W)."""
        with under_attack(self.classifier):
            if self.config.joint:  # the logits at hand were made with batch statistics, which crafting does not use
                with torch.no_grad():
                    logits = self.classifier(restored)
            steps, size = self.config.perturb_steps, self.config.perturb_step_size
            return perturbation(
                self.classifier,
                restored,
                logits,
                threat_of(self.threat),
                steps,
                self.threat.step_for(steps) if size is None else size,
                batch.draws["perturbation"],
            )

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

    def deployed(self) -> Defended:
        return Defended(self.denoiser, self.classifier)


class JointRecipe(DirRecipe):
    """Trains denoiser and target together by TRADES or MART on h(g(x)) in place of Eq. 7.

    So do two scripts that the authors deleted. Natural images pass under masks of their own.
    """

    def __init__(
        self,
        denoiser: MaskedPurifier,
        classifier: nn.Module,
        config: DirConfig,
        attack: AttackConfig,
        target: TargetConfig,
    ) -> None:
        super().__init__(denoiser, classifier, config, attack)
        self.target = target

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Those of DIR, of which the start of Eq. 4 has no use, and permutations for the natural images."""
        return {**super().draws(stream, shape), **drawn(stream, "masks/natural", self.denoiser)}

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """``target.objective`` of logits: TRADES's natural or MART's boosted term, and beta times their divergence."""
        logits = self.classifier(self.denoiser(batch.images, batch.draws["masks/natural"]))
        attacked = self.classifier(self.denoiser(batch.attacked, batch.draws["masks"]))
        if self.target.objective == "mart":
            name = "boosted"
            first, divergence = mart_terms(logits, attacked, batch.labels)
        else:
            name = "natural"
            first, divergence = F.cross_entropy(logits.float(), batch.labels), kl_divergence(logits, attacked).mean()
        return {"loss": first + self.target.weight * divergence, name: first, "divergence": divergence}


def _denoiser(run: DirRun) -> Callable[[], nn.Module]:
    data = run.data
    return lambda: MaskedPurifier(run.model, run.masking, data.channels, data.height, data.width)


def _of(modules: Modules) -> MaskedPurifier:
    denoiser = modules["denoiser"]
    assert isinstance(denoiser, MaskedPurifier)
    return denoiser


def stages(run: DirRun) -> tuple[Stage, ...]:
    """Target, pre-training and DIR; DIR alone where the target learns together with the denoiser."""
    pretrain = Stage(
        "pretrain",
        lambda modules: PretrainRecipe(_of(modules), modules["classifier"], run.attack),
        run.pretrain.epochs,
        {"denoiser": run.pretrain.optimizer},
        sections=("masking", "model", "pretrain"),
        keep="last",
        on_pipeline=False,
    )
    optimizers = {"denoiser": run.dir.optimizer}
    if run.dir.joint:
        optimizers["classifier"] = run.dir.target_optimizer
    paired = run.dir.joint and run.target.objective != "at"

    def recipe(modules: Modules) -> Recipe:
        if paired:
            return JointRecipe(_of(modules), modules["classifier"], run.dir, run.attack, run.target)
        return DirRecipe(_of(modules), modules["classifier"], run.dir, run.attack)

    game = Stage(
        "dir",
        recipe,
        run.dir.epochs,
        optimizers,
        sections=("masking", "model", "dir", *(("target",) if run.dir.joint else ())),
        stored=("denoiser", "classifier"),
        keep=run.dir.keep,
        ema=run.dir.ema or None,
        passes=run.attack.pipeline_gradients + (2 if paired else 1),
    )
    if run.dir.joint:
        return (game,)
    return (target_stage(run), *((pretrain,) if run.pretrain.epochs else ()), game)


def describe(run: DirRun) -> str:
    """For the model card."""
    model, objective = run.model, run.target.objective.upper()
    together = f"\nTarget and denoiser learned together, by {objective}." if run.dir.joint else ""
    return (
        f"Masked auto-encoding denoiser in front of a classifier (DIR; Zhou et al., ICML 2023): each image is seen\n"
        f"through {run.masking.masks} masks that hide {run.masking.ratio:.0%} of its {run.tokens} patches, restored"
        f" from each, averaged, classified.\nDenoiser: patch {model.patch}, width {model.width}, {model.encoder_depth}"
        f" + {model.decoder_depth} blocks; alpha {run.dir.alpha:g}.{together}"
    )


def facts(run: DirRun) -> list[tuple[str, str]]:
    """For --dry-run."""
    kept, tokens = run.masking.kept(run.tokens), run.tokens
    return [("masks", f"{run.masking.masks}, each keeps {kept} of {tokens} patches")]


DEFENSE = Defense(
    name="dir",
    run=DirRun,
    modules=lambda run: {"denoiser": _denoiser(run)},
    stages=stages,
    describe=describe,
    facts=facts,
    purifier="denoiser",
    sections=("model", "masking"),
)
