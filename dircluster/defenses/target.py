"""Stage 0, the target h: natural training, adversarial training, TRADES and MART (METHOD section 2), with AWP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dircluster.attacks.gradient import kl_ascent, kl_divergence, pgd
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig, RunConfig, TargetConfig
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Stage
from dircluster.models.modules import under_attack
from dircluster.rng import Stream


def mart_terms(natural: Tensor, adversarial: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """MART's boosted cross-entropy and its weighted KL (Wang et al. 2020), batch means.

    BCE = -log p'_y - log(1 - max_{k != y} p'_k), and KL(p || p') (1 - p_y), with p of the natural logits
    (N, classes) and p' of the adversarial ones; 1 - max is clamped to 1e-6 from below.
    """
    log_adversarial = F.log_softmax(adversarial.float(), dim=1)
    others = log_adversarial.exp().scatter(1, labels[:, None], 0.0).amax(dim=1)
    boosted = F.nll_loss(log_adversarial, labels) - torch.log((1 - others).clamp_min(1e-6)).mean()
    true = F.softmax(natural.float(), dim=1).gather(1, labels[:, None]).squeeze(1)
    return boosted, (kl_divergence(natural, adversarial) * (1 - true)).mean()


def perturbed_weights(
    module: nn.Module, loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor], share: float
) -> dict[str, Tensor]:
    """Parameters of ``module`` moved against its loss by ``share`` of each layer's norm: AWP (Wu et al. 2020).

    v = share ||w|| g / ||g|| for each w of more than one dimension, with g the gradient of ``loss_of`` what answers in
    place of the module. Batch statistics are not updated on the way, and gradients of the result are those at w + v.
    What is frozen, or has no part in the loss, stays where it is.
    """
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1 and p.requires_grad}
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    loss = loss_of(lambda images: functional_call(module, buffers, (images,)))
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {
        name: weight + share * weight.detach().norm() * gradient / gradient.norm().clamp_min(1e-12)
        for (name, weight), gradient in zip(weights.items(), found, strict=True)
        if gradient is not None
    }


class TargetRecipe(Recipe):
    """Trains a classifier by ``config.objective`` under the threat of ``attack``."""

    trained = ("classifier",)

    def __init__(self, classifier: nn.Module, config: TargetConfig, attack: AttackConfig) -> None:
        super().__init__()
        self.classifier = classifier
        self.config = config
        self.threat = attack
        self.attacks_deployed = config.objective != "natural"

    @property
    def alone(self) -> str | None:
        """With AWP the gradient of a whole batch moves the weights, before there is a mean over workers."""
        return None if self.config.awp is None else "perturbs weights by a whole batch (target.awp)"

    def draws(self, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The start of the attack that the objective crafts by."""
        objective = self.config.objective
        if objective == "natural":
            return {}
        if objective == "trades":
            return {"trades": stream.normal("trades", shape)}
        return {"pgd": stream.uniform("pgd", shape)}

    def attack(self, batch: Batch) -> Batch:
        """PGD on the cross-entropy for at and mart; KL ascent for trades; nothing for natural training."""
        objective, attack = self.config.objective, self.threat
        if objective == "natural":
            return batch
        images, threat = batch.images, threat_of(attack)
        with under_attack(self.classifier):
            if objective == "trades":
                with torch.no_grad():
                    reference = self.classifier(images)
                steps = self.config.trades_steps
                found = kl_ascent(
                    self.classifier, images, reference, threat, steps, attack.step_for(steps), batch.draws["trades"]
                )
            else:
                found = pgd(
                    self.classifier, images, batch.labels, threat, attack.steps, attack.step, batch.draws["pgd"]
                )
        return replace(batch, adversarial=found)

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        """natural, adversarial and regularizer terms, as far as the objective has them; with AWP at moved weights."""
        if self.config.awp is None:
            return self._terms(self.classifier, batch)
        moved = perturbed_weights(self.classifier, lambda h: self._terms(h, batch)["loss"], self.config.awp)
        return self._terms(lambda images: functional_call(self.classifier, moved, (images,)), batch)

    def _terms(self, classifier: Callable[[Tensor], Tensor], batch: Batch) -> dict[str, Tensor]:
        objective, labels = self.config.objective, batch.labels
        if objective == "natural":
            natural = F.cross_entropy(classifier(batch.images).float(), labels)
            return {"loss": natural, "natural": natural}
        adversarial = classifier(batch.attacked)
        if objective == "at":
            term = F.cross_entropy(adversarial.float(), labels)
            return {"loss": term, "adversarial": term}
        logits = classifier(batch.images)
        if objective == "trades":
            natural = F.cross_entropy(logits.float(), labels)
            divergence = kl_divergence(logits, adversarial).mean()
            return {"loss": natural + self.config.weight * divergence, "natural": natural, "divergence": divergence}
        boosted, divergence = mart_terms(logits, adversarial, labels)
        return {"loss": boosted + self.config.weight * divergence, "boosted": boosted, "divergence": divergence}

    def deployed(self) -> nn.Module:
        return self.classifier


def target_stage(run: RunConfig) -> Stage:
    """The first stage of every defense: the target by ``target.objective``, under the threat of ``attack``."""
    return Stage(
        "target",
        lambda modules: TargetRecipe(modules["classifier"], run.target, run.attack),
        run.target.epochs,
        {"classifier": run.target.optimizer},
        sections=("target",),
        ema=run.target.ema or None,
        on_pipeline=False,
        passes=passes(run),
        **(kept_by(run) if run.target.uri is None else {}),  # one that is given is not trained
    )


def kept_by(run: RunConfig) -> dict[str, Any]:
    """How a stage of ``target.objective`` chooses its weights: natural training ends on its last.

    Under attack it is best while it has hardly learned.
    """
    return {"keep": "last", "revision": 2} if run.target.objective == "natural" else {}


def passes(run: RunConfig) -> int:
    """Passes through the target in an update of it: those of crafting, and the update's own.

    TRADES asks for the natural logits before it crafts, and like MART for both in the update.
    """
    crafting = {"natural": 0, "trades": 1 + run.target.trades_steps}.get(run.target.objective, run.attack.steps)
    return crafting + (2 if run.target.objective in ("trades", "mart") else 1)
