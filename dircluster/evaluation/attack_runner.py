"""From an attack's spec to adversarial images, and from these to what the defense gets right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dircluster.attacks.gradient import Model
from dircluster.evaluation.attack_table import AttackSetting, AttackSpec, find_attack, known_images
from dircluster.evaluation.probes import PROBES, Question
from dircluster.evaluation.victim import VictimModel


@dataclass(frozen=True)
class AttackRunner(AttackSetting):
    """Attacks one shard of images as its spec says."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        """(N, C, H, W), (N,) -> adversarial images (N, C, H, W), and what is to be warned of."""
        return find_attack(self.spec.attack).run(self, images, labels)


def judge(
    victim: VictimModel, spec: AttackSpec, defense_seed: int, seed: int, most_rows: int
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """How final images are judged: (N, C, H, W), (N,) -> what was right, under ``fixed`` or ``fresh``.

    ``fixed`` (N, 1): by the target alone, or under the draws that the attacker knew. ``fresh`` (N, draws): on fresh
    draws, which no attack has met. Logits that are not finite are wrong. Of a probe, ``fixed`` says what passes it.
    """

    def right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return _right(model(images), labels)

    def judged(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        verdicts: dict[str, Tensor] = {}
        if spec.attack in PROBES:
            pixel = spec.epsilon if spec.norm == "linf" else spec.epsilon / images[0].numel() ** 0.5
            question = Question(victim, spec.randomness, seed, pixel, spec.eot, most_rows)
            return {"fixed": PROBES[spec.attack](question, images, labels)[:, None]}
        if spec.judged == "target" or find_attack(spec.attack).past_purifier:
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
        found = model(images.repeat(count, 1, 1, 1))
        columns.append(_right(found, labels.repeat(count)).view(count, len(images)))
    return torch.cat(columns).T


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
