"""From a case to adversarial images: which attack meets which form of the defense."""

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
    Slope,
    climb,
    cross_entropy,
    cross_entropy_loss,
    margin_loss,
    mi_fgsm,
    slope,
    strongest,
    vni_fgsm,
)
from dircluster.attacks.masked import masked_attack
from dircluster.attacks.restored import restored_attack
from dircluster.attacks.threat import BALLS, L2, LInf
from dircluster.evaluation.suites import Case
from dircluster.evaluation.victim import Subject

LOSSES = {"ce": cross_entropy_loss, "margin": margin_loss}
OWN: dict[str, tuple[Callable[..., Any], ...]] = {
    "natural": (),
    "noise": (LInf,),
    "autoattack": (autoattack,),
    "square": (square,),
    "masked": (masked_attack,),
    "restored": (restored_attack, climb),
}
"""What runs the attacks that are not ascents on the averaged gradient of :func:`expected`, by name."""


def modules_of_attack(attack: str) -> frozenset[str]:
    """The modules whose code runs ``attack``, without what they import in turn."""
    return frozenset(part.__module__ for part in OWN.get(attack, (climb, expected)))


@dataclass(frozen=True)
class Crafter:
    """Crafts for one shard of images; all that it draws follows from ``seed``, which names the shard and the case.

    ``defense_seed`` names the draws of the fixed form, which belong to the shard alone: every case knows the same.
    ``most_rows`` bounds the rows, images times draws, that pass through a model at a time.
    """

    subject: Subject
    case: Case
    seed: int
    defense_seed: int
    most_rows: int

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        """(N, C, H, W), (N,) -> adversarial images (N, C, H, W), and what is to be warned of."""
        case, attack = self.case, self.case.attack
        if attack in ("natural", "gradient"):
            return images, []
        if attack == "noise":
            return self.threat.start(images, self._uniform("noise", images)), []
        if attack == "autoattack":
            version: Literal["standard", "rand"] = "rand" if case.masks == "fresh" else "standard"
            model = self._model(len(images))
            return autoattack(
                model, images, labels, self.threat, version, self.seed, len(images), case.eot, case.steps or None
            )
        if attack == "square":
            draws = case.eot if case.masks == "fresh" else 1
            model = self._model(len(images))
            return square(model, images, labels, self.threat, case.steps, draws, self.seed, self.most_rows), []
        if attack == "masked":
            return self._masked(images, labels), []
        if attack == "restored":
            return self._restored(images, labels), []
        made = [self._first_order(images, labels, restart) for restart in range(case.restarts)]
        if len(made) > 1:
            model = self._model(len(images), "judge")
            margin = expected(model, labels, case.eot, margin_loss, self.most_rows)
            return strongest(lambda found: margin(found)[0], made), []
        return made[0], []

    @property
    def threat(self) -> LInf | L2:
        """The ball of the case."""
        return BALLS[self.case.norm](self.case.epsilon)

    def _first_order(self, images: Tensor, labels: Tensor, restart: int) -> Tensor:
        case, threat = self.case, self.threat
        both = self._slope(labels, f"craft/{restart}")
        if case.attack == "fgsm":
            return climb(both, images, images, threat, 1, threat.epsilon)
        if case.attack == "mifgsm":
            return mi_fgsm(both, images, threat, case.steps, case.step_size)
        if case.attack == "vnifgsm":
            generator = rng.generator(self.seed, "neighbours")
            return vni_fgsm(both, images, threat, case.steps, case.step_size, lambda: _draw(generator, images))
        start = threat.start(images, self._uniform(f"start/{restart}", images))
        randomised = case.masks == "fresh"  # the last iterate may have met an unlucky draw
        return climb(both, start, images, threat, case.steps, case.step_size, keep_best=randomised)

    def _slope(self, labels: Tensor, purpose: str) -> Slope:
        """Loss and gradient of the form that the attacker faces, averaged over draws where they are fresh."""
        case, images = self.case, len(labels)
        if case.attack == "bpda":
            model = self.subject.bypassed(case.masks, self._seed(case.masks, purpose), known_images(case, images))
        else:
            model = self._model(images, purpose)
        return expected(model, labels, case.eot, LOSSES[case.loss], self.most_rows)

    def _model(self, images: int, purpose: str = "craft") -> Model:
        case = self.case
        if case.on == "target":
            source = self.subject.target if case.judged == "target" else self.subject.source
            assert source is not None
            return source
        return self.subject.model(
            case.masks, self._seed(case.masks, purpose), case.average, known_images(case, images), self.most_rows
        )

    def _target(self) -> Model:
        assert self.subject.target is not None
        return self.subject.target

    def _masked(self, images: Tensor, labels: Tensor) -> Tensor:
        case, subject = self.case, self.subject
        masks = subject.masks(case.masks, self._seed(case.masks, "craft"), len(images))
        return masked_attack(
            subject.logits_under,
            images,
            labels,
            self.threat,
            case.steps,
            case.step_size,
            masks,
            subject.pixel_masks,
            self._uniform("start", images),
        )

    def _restored(self, images: Tensor, labels: Tensor) -> Tensor:
        case = self.case
        if case.source == "adversarial":
            both = slope(cross_entropy(self._model(len(images)), labels))
            start = self.threat.start(images, self._uniform("source", images))
            images = climb(both, start, images, self.threat, case.steps, case.step_size)
        with torch.no_grad():
            restore = self.subject.restorer(
                case.masks, self._seed(case.masks, "craft"), known_images(case, len(images))
            )
            restored = restore(images)
        uniform = self._uniform("start", images)
        return restored_attack(self._target(), restored, labels, self.threat, case.steps, case.step_size, uniform)

    def _seed(self, masks: str, purpose: str) -> int:
        return self.defense_seed if masks == "fixed" else rng.entropy(self.seed, purpose)

    def _uniform(self, purpose: str, images: Tensor) -> Tensor:
        return _draw(rng.generator(self.seed, purpose), images)


def _draw(generator: torch.Generator, images: Tensor) -> Tensor:
    return torch.rand(images.shape, generator=generator).to(images)


def known_images(case: Case, images: int) -> int:
    """How many images' fixed masks there are: one for each, or one for all where an attack passes some alone."""
    return 1 if case.attack == "autoattack" else images


def judge(
    subject: Subject, case: Case, defense_seed: int, seed: int, most_rows: int
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """How final images are judged: (N, C, H, W), (N,) -> what was right, under ``known`` or ``anew``.

    ``known`` (N, 1): by the target alone, or under the draws that the attacker knew. ``anew`` (N, draws): on fresh
    draws, which no attack has met.
    """

    def right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return model(images).argmax(dim=1) == labels

    def judged(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        verdicts: dict[str, Tensor] = {}
        if case.attack == "gradient":
            _, steep = expected(subject.model(case.masks, seed), labels, case.eot, most_rows=most_rows)(images)
            return {"known": (steep.isfinite().flatten(1).all(dim=1) & (steep != 0).flatten(1).any(dim=1))[:, None]}
        if case.judged == "target" or case.attack == "restored":
            assert subject.target is not None
            return {"known": right(subject.target, images, labels)[:, None]}
        if case.masks != "fresh":
            known = subject.model(case.masks, defense_seed, images=known_images(case, len(images)))
            verdicts["known"] = right(known, images, labels)[:, None]
        if case.masks != "none":
            rows = max(1, most_rows // len(images)) if case.average == 1 else 1
            anew = subject.model("fresh", seed, case.average, most_rows=most_rows)
            verdicts["anew"] = _anew(anew, images, labels, case.draws, rows)
        return verdicts

    return judged


def _anew(model: Model, images: Tensor, labels: Tensor, draws: int, at_once: int) -> Tensor:
    columns = []
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        found = model(images.repeat(count, 1, 1, 1)).argmax(dim=1).view(count, len(images))
        columns.append(found == labels)
    return torch.cat(columns).T
