"""From an attack's spec to adversarial images: which attack meets which form of the defense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.autoattack import autoattack, square
from dircluster.attacks.expectation import expected
from dircluster.attacks.gradient import (
    Model,
    ValueAndGrad,
    cross_entropy,
    cross_entropy_loss,
    margin_loss,
    mi_fgsm,
    projected_ascent,
    strongest,
    value_and_grad,
    vni_fgsm,
)
from dircluster.attacks.masked import masked_attack
from dircluster.attacks.restored import restored_attack
from dircluster.attacks.threat import BALLS, L2, LInf
from dircluster.evaluation.suites import AttackSpec
from dircluster.evaluation.victim import VictimModel

LOSSES = {"ce": cross_entropy_loss, "margin": margin_loss}
OWN: dict[str, tuple[Callable[..., Any], ...]] = {
    "natural": (),
    "noise": (LInf,),
    "autoattack": (autoattack,),
    "square": (square,),
    "masked": (masked_attack,),
    "restored": (restored_attack, projected_ascent),
}
"""What runs the attacks that are not ascents on the averaged gradient of :func:`expected`, by name."""


def modules_of_attack(attack: str) -> frozenset[str]:
    """The modules whose code runs ``attack``, without what they import in turn."""
    return frozenset(part.__module__ for part in OWN.get(attack, (projected_ascent, expected)))


@dataclass(frozen=True)
class AttackRunner:
    """Attacks one shard of images; all that it draws follows from ``seed``, which names the shard.

    ``defense_seed`` names the draws of the fixed form, which belong to the shard alone: every attack knows the same.
    ``most_rows`` bounds the rows, images times draws, that pass through a model at a time.
    """

    victim: VictimModel
    spec: AttackSpec
    seed: int
    defense_seed: int
    most_rows: int

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        """(N, C, H, W), (N,) -> adversarial images (N, C, H, W), and what is to be warned of."""
        spec, attack = self.spec, self.spec.attack
        if attack in ("natural", "gradient"):
            return images, []
        if attack == "noise":
            return self.threat.start(images, self._uniform("noise", images)), []
        if attack == "autoattack":
            version: Literal["standard", "rand"] = "rand" if spec.randomness == "fresh" else "standard"
            model = self._model(len(images))
            return autoattack(
                model, images, labels, self.threat, version, self.seed, len(images), spec.eot, spec.steps or None
            )
        if attack == "square":
            draws = spec.eot if spec.randomness == "fresh" else 1
            model = self._model(len(images))
            return square(model, images, labels, self.threat, spec.steps, draws, self.seed, self.most_rows), []
        if attack == "masked":
            return self._masked(images, labels), []
        if attack == "restored":
            return self._restored(images, labels), []
        made = [self._first_order(images, labels, restart) for restart in range(spec.restarts)]
        if len(made) > 1:
            model = self._model(len(images), "judge")
            margin = expected(model, labels, spec.eot, margin_loss, self.most_rows)
            return strongest(lambda found: margin(found)[0], made), []
        return made[0], []

    @property
    def threat(self) -> LInf | L2:
        """The ball of the attack."""
        return BALLS[self.spec.norm](self.spec.epsilon)

    def _first_order(self, images: Tensor, labels: Tensor, restart: int) -> Tensor:
        spec, threat = self.spec, self.threat
        both = self._value_and_grad(labels, f"craft/{restart}")
        if spec.attack == "fgsm":
            return projected_ascent(both, images, images, threat, 1, threat.epsilon)
        if spec.attack == "mifgsm":
            return mi_fgsm(both, images, threat, spec.steps, spec.step_size)
        if spec.attack == "vnifgsm":
            generator = rng.generator(self.seed, "neighbours")
            return vni_fgsm(both, images, threat, spec.steps, spec.step_size, lambda: _draw(generator, images))
        start = threat.start(images, self._uniform(f"start/{restart}", images))
        randomized = spec.randomness == "fresh"  # the last iterate may have met an unlucky draw
        return projected_ascent(both, start, images, threat, spec.steps, spec.step_size, keep_best=randomized)

    def _value_and_grad(self, labels: Tensor, purpose: str) -> ValueAndGrad:
        """Loss and gradient of the form that the attacker faces, averaged over draws where they are fresh."""
        spec, images = self.spec, len(labels)
        if spec.attack == "bpda":
            model = self.victim.bypassed(
                spec.randomness, self._seed(spec.randomness, purpose), known_images(spec, images)
            )
        else:
            model = self._model(images, purpose)
        return expected(model, labels, spec.eot, LOSSES[spec.loss], self.most_rows)

    def _model(self, images: int, purpose: str = "craft") -> Model:
        spec = self.spec
        if spec.on == "target":
            source = self.victim.target if spec.judged == "target" else self.victim.source
            assert source is not None
            return source
        return self.victim.model(
            spec.randomness,
            self._seed(spec.randomness, purpose),
            spec.average,
            known_images(spec, images),
            self.most_rows,
        )

    def _target(self) -> Model:
        assert self.victim.target is not None
        return self.victim.target

    def _masked(self, images: Tensor, labels: Tensor) -> Tensor:
        spec, victim = self.spec, self.victim
        masks = victim.masks(spec.randomness, self._seed(spec.randomness, "craft"), len(images))
        return masked_attack(
            victim.logits_under,
            images,
            labels,
            self.threat,
            spec.steps,
            spec.step_size,
            masks,
            victim.pixel_masks,
            self._uniform("start", images),
        )

    def _restored(self, images: Tensor, labels: Tensor) -> Tensor:
        spec = self.spec
        if spec.source == "adversarial":
            both = value_and_grad(cross_entropy(self._model(len(images)), labels))
            start = self.threat.start(images, self._uniform("source", images))
            images = projected_ascent(both, start, images, self.threat, spec.steps, spec.step_size)
        with torch.no_grad():
            restore = self.victim.restorer(
                spec.randomness, self._seed(spec.randomness, "craft"), known_images(spec, len(images))
            )
            restored = restore(images)
        uniform = self._uniform("start", images)
        return restored_attack(self._target(), restored, labels, self.threat, spec.steps, spec.step_size, uniform)

    def _seed(self, randomness: str, purpose: str) -> int:
        return self.defense_seed if randomness == "fixed" else rng.entropy(self.seed, purpose)

    def _uniform(self, purpose: str, images: Tensor) -> Tensor:
        return _draw(rng.generator(self.seed, purpose), images)


def _draw(generator: torch.Generator, images: Tensor) -> Tensor:
    return torch.rand(images.shape, generator=generator).to(images)


def known_images(spec: AttackSpec, images: int) -> int:
    """How many images' fixed masks there are: one for each, or one for all where an attack passes some alone."""
    return 1 if spec.attack == "autoattack" else images


def judge(
    victim: VictimModel, spec: AttackSpec, defense_seed: int, seed: int, most_rows: int
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """How final images are judged: (N, C, H, W), (N,) -> what was right, under ``fixed`` or ``fresh``.

    ``fixed`` (N, 1): by the target alone, or under the draws that the attacker knew. ``fresh`` (N, draws): on fresh
    draws, which no attack has met.
    """

    def right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return model(images).argmax(dim=1) == labels

    def judged(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        verdicts: dict[str, Tensor] = {}
        if spec.attack == "gradient":
            _, steep = expected(victim.model(spec.randomness, seed), labels, spec.eot, most_rows=most_rows)(images)
            return {"fixed": (steep.isfinite().flatten(1).all(dim=1) & (steep != 0).flatten(1).any(dim=1))[:, None]}
        if spec.judged == "target" or spec.attack == "restored":
            assert victim.target is not None
            return {"fixed": right(victim.target, images, labels)[:, None]}
        if spec.randomness != "fresh":
            fixed = victim.model(spec.randomness, defense_seed, images=known_images(spec, len(images)))
            verdicts["fixed"] = right(fixed, images, labels)[:, None]
        if spec.randomness != "none":
            rows = max(1, most_rows // len(images)) if spec.average == 1 else 1
            fresh = victim.model("fresh", seed, spec.average, most_rows=most_rows)
            verdicts["fresh"] = _fresh(fresh, images, labels, spec.draws, rows)
        return verdicts

    return judged


def _fresh(model: Model, images: Tensor, labels: Tensor, draws: int, at_once: int) -> Tensor:
    columns = []
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        found = model(images.repeat(count, 1, 1, 1)).argmax(dim=1).view(count, len(images))
        columns.append(found == labels)
    return torch.cat(columns).T
