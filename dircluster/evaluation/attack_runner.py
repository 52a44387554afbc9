"""From an attack's spec to adversarial images, and from these to what the defense gets right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dircluster.attacks.expectation import expected
from dircluster.attacks.gradient import Model
from dircluster.evaluation.attack_table import AttackSetting, AttackSpec, find_attack, known_images
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
    """How final images are judged: (N, C, H, W), (N,) -> the classes predicted (int64), under ``fixed`` or ``fresh``.

    ``fixed`` (N, 1): by the target alone, or under the draws that the attacker knew. ``fresh`` (N, draws): on fresh
    draws, which no attack has met. Where no class is what counts, what was right (bool).
    """

    def predicted(model: Model, images: Tensor) -> Tensor:
        return model(images).argmax(dim=1)[:, None]

    def judged(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        verdicts: dict[str, Tensor] = {}
        if spec.attack == "gradient":
            _, steep = expected(victim.model(spec.randomness, seed), labels, spec.eot, most_rows=most_rows)(images)
            return {"fixed": (steep.isfinite().flatten(1).all(dim=1) & (steep != 0).flatten(1).any(dim=1))[:, None]}
        if spec.judged == "target" or find_attack(spec.attack).past_purifier:
            assert victim.target is not None
            return {"fixed": predicted(victim.target, images)}
        if spec.randomness != "fresh":
            fixed = victim.model(spec.randomness, defense_seed, images=known_images(spec, len(images)))
            verdicts["fixed"] = predicted(fixed, images)
        if spec.randomness != "none":
            rows = max(1, most_rows // len(images)) if spec.average == 1 else 1
            fresh = victim.model("fresh", seed, spec.average, most_rows=most_rows)
            verdicts["fresh"] = _fresh(fresh, images, spec.draws, rows)
        return verdicts

    return judged


def _fresh(model: Model, images: Tensor, draws: int, at_once: int) -> Tensor:
    columns = []
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        columns.append(model(images.repeat(count, 1, 1, 1)).argmax(dim=1).view(count, len(images)))
    return torch.cat(columns).T
