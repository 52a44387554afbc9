"""From an attack's spec to adversarial images, and from these to what the defense gets right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster.attacks.gradient import Model
from dircluster.evaluation.attack_table import AttackSetting, AttackSpec, find_attack, is_right, known_images
from dircluster.evaluation.probes import PROBES, Question
from dircluster.evaluation.victim import VictimModel


@dataclass(frozen=True)
class AttackRunner(AttackSetting):
    """Attacks one shard of images as its spec says."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        """(N, C, H, W), (N,) -> adversarial images (N, C, H, W), and what is to be warned of."""
        return find_attack(self.spec.attack).run(self, images, labels)


def judge(
    victim: VictimModel, spec: AttackSpec, defense_seed: int, seed: int, most_rows: int, broken: Sequence[Tensor] = ()
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """How final images are judged: (N, C, H, W), (N,) -> what was right, under ``fixed`` or ``fresh``.

    ``fixed`` (N, 1): by the target alone, or under the draws that the attacker knew. ``fresh`` (N, draws): on fresh
    draws, which no attack has met. Under protocol mv these are votes; under wor there is one column, of what was right
    in all of them and in all that ``broken`` tells of the attack, (draws * N,) bool a pass. Logits that are not finite
    are wrong. Of a probe, ``fixed`` says what passes it.
    """

    def right(model: Model, images: Tensor, labels: Tensor) -> Tensor:
        return is_right(model(images), labels)

    def judged(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        verdicts: dict[str, Tensor] = {}
        if spec.attack in PROBES:
            pixel = spec.epsilon if spec.norm == "linf" else spec.epsilon / images[0].numel() ** 0.5
            question = Question(victim, spec.randomness, seed, pixel, spec.eot, most_rows)
            return {"fixed": PROBES[spec.attack](question, images, labels)[:, None]}
        if spec.judged == "target" or find_attack(spec.attack).past_purifier:
            assert victim.target is not None
            return {"fixed": right(victim.target, images, labels)[:, None]}
        if spec.protocol == "mv":
            voter = victim.model("fresh", seed)
            return {"fresh": _votes(voter, images, labels, spec, max(1, most_rows // len(images)))}
        if spec.randomness != "fresh":
            fixed = victim.model(spec.randomness, defense_seed, images=known_images(spec, len(images)))
            verdicts["fixed"] = right(fixed, images, labels)[:, None]
        if spec.randomness != "none":
            rows = max(1, most_rows // len(images)) if spec.average == 1 else 1
            fresh = victim.model("fresh", seed, spec.average, most_rows=most_rows)
            verdicts["fresh"] = _fresh(fresh, images, labels, spec.draws, rows)
        if spec.protocol == "wor":
            seen = [~wrong.view(-1, len(images)).T for wrong in broken]
            verdicts["fresh"] = torch.cat([verdicts["fresh"], *seen], dim=1).all(dim=1, keepdim=True)
        return verdicts

    return judged


def _passes(model: Model, images: Tensor, draws: int, at_once: int) -> Iterator[Tensor]:
    """Logits under ``draws`` draws, (some, N, classes) at a time."""
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        yield model(images.repeat(count, 1, 1, 1)).view(count, len(images), -1)


def _fresh(model: Model, images: Tensor, labels: Tensor, draws: int, at_once: int) -> Tensor:
    return torch.cat([is_right(logits, labels) for logits in _passes(model, images, draws, at_once)]).T


def _votes(model: Model, images: Tensor, labels: Tensor, spec: AttackSpec, at_once: int) -> Tensor:
    """Whether the majority of ``average`` draws is right, ``draws`` times; probability decides among equals."""
    columns = []
    for _ in range(spec.draws):
        counted: Tensor | float = 0.0
        for logits in _passes(model, images, spec.average, at_once):
            ballots = F.one_hot(logits.argmax(dim=2), logits.shape[2])
            counted = counted + (ballots + logits.float().softmax(dim=2) / (spec.average + 1)).sum(dim=0)
        assert isinstance(counted, Tensor)
        columns.append(is_right(counted, labels))
    return torch.stack(columns, dim=1)
