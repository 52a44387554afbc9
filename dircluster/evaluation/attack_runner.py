"""From an attack's spec to adversarial images, and from these to what the defense gets right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster.attacks.gradient import Model, margin_loss
from dircluster.config import ConfigError
from dircluster.evaluation.attack_table import AttackSetting, AttackSpec, answers, check_fits, find_attack, known_images
from dircluster.evaluation.probes import PROBES, Question
from dircluster.evaluation.victim import VictimModel


@dataclass(frozen=True)
class AttackRunner(AttackSetting):
    """Attacks one shard of images as its spec says."""

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        """(N, C, H, W), (N,) -> adversarial images (N, C, H, W), and what is to be warned of.

        Raises ConfigError for what does not fit the victim, see check_fits, and under protocol wor where the attack
        does not tell what its draws break.
        """
        check_fits(self.spec, self.victim)
        made = find_attack(self.spec.attack).run(self, images, labels)
        if self.spec.protocol == "wor" and self.spec.steps and not self.broken:
            raise ConfigError(
                f"attack {self.spec.name} does not tell what each draw breaks, which protocol wor counts: take one that"
                " follows the averaged gradient, such as pgd"
            )
        return made

    @property
    def leaves(self) -> bool:
        """Whether an image that a pass gets wrong is attacked no more."""
        return find_attack(self.spec.attack).leaves(self)

    def wrong(self, images: Tensor, labels: Tensor, nearly: float = 0.0) -> Tensor:
        """Which images (N, C, H, W) what is attacked gets wrong, in the precision of the surroundings; -> (N,) bool.

        The true class may share the highest logit, or lead by ``nearly`` times the spread of an image's logits.
        """
        with torch.no_grad():
            logits = self.model(len(images))(images).float()
            return ~(margin_loss(logits, labels) < -nearly * (logits.amax(dim=1) - logits.amin(dim=1)))


def judge(
    victim: VictimModel, spec: AttackSpec, defense_seed: int, seed: int, most_rows: int, broken: Sequence[Tensor] = ()
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """How final images are judged: (N, C, H, W), (N,) -> the classes predicted (int64), under ``fixed`` or ``fresh``.

    ``fixed`` (N, 1): by the target alone, or under the draws that the attacker knew. ``fresh`` (N, draws): on fresh
    draws, which no attack has met; under protocol mv the vote of several. Class -1 is no answer: logits that are not
    finite. Where no class is what counts, what was right (bool): of a probe what passes it; under wor one column, what
    was right in all draws and in all that ``broken`` tells of the attack, (draws * N,) bool a pass.
    """

    def predicted(model: Model, images: Tensor) -> Tensor:
        return answers(model(images))[:, None]

    def judged(images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        verdicts: dict[str, Tensor] = {}
        at_once = 1 if victim.apart else max(1, most_rows // len(images))
        if spec.attack in PROBES:
            pixel = spec.epsilon if spec.norm == "linf" else spec.epsilon / images[0].numel() ** 0.5
            question = Question(victim, spec.randomness, seed, pixel, spec.eot, most_rows)
            return {"fixed": PROBES[spec.attack](question, images, labels)[:, None]}
        if spec.judged == "target" or find_attack(spec.attack).past_purifier:
            assert victim.target is not None
            return {"fixed": predicted(victim.target, images)}
        if spec.protocol == "mv":
            voter = victim.model("fresh", seed)
            return {"fresh": _votes(voter, images, spec, at_once)}
        if spec.randomness != "fresh":
            fixed = victim.model(spec.randomness, defense_seed, images=known_images(spec, len(images)))
            verdicts["fixed"] = predicted(fixed, images)
        if spec.randomness != "none":
            rows = at_once if spec.average == 1 else 1
            fresh = victim.model("fresh", seed, spec.average, most_rows=most_rows)
            verdicts["fresh"] = _fresh(fresh, images, spec.draws, rows)
        if spec.protocol == "wor":
            seen = [~wrong.view(-1, len(images)).T for wrong in broken]
            kept = torch.cat([verdicts["fresh"] == labels[:, None], *seen], dim=1)
            verdicts["fresh"] = kept.all(dim=1, keepdim=True)
        return verdicts

    return judged


def _passes(model: Model, images: Tensor, draws: int, at_once: int) -> Iterator[Tensor]:
    """Logits under ``draws`` draws, (some, N, classes) at a time."""
    for first in range(0, draws, at_once):
        count = min(at_once, draws - first)
        yield model(images.repeat(count, 1, 1, 1)).view(count, len(images), -1)


def _fresh(model: Model, images: Tensor, draws: int, at_once: int) -> Tensor:
    """The answer to each of images (N, C, H, W) in each draw: (N, draws)."""
    return torch.cat([answers(logits) for logits in _passes(model, images, draws, at_once)]).T


def _votes(model: Model, images: Tensor, spec: AttackSpec, at_once: int) -> Tensor:
    """The majority's answer of ``average`` draws, ``draws`` times: (N, draws); probability decides among equals."""
    columns = []
    for _ in range(spec.draws):
        counted: Tensor | float = 0.0
        for logits in _passes(model, images, spec.average, at_once):
            ballots = F.one_hot(logits.argmax(dim=2), logits.shape[2])
            counted = counted + (ballots + logits.float().softmax(dim=2) / (spec.average + 1)).sum(dim=0)
        assert isinstance(counted, Tensor)
        columns.append(answers(counted))
    return torch.stack(columns, dim=1)
