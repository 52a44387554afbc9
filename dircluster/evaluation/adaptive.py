"""Attacks that know one purifier, as rows of the suites for it: what :class:`AdaptiveAttack` names as specs."""

from __future__ import annotations

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.defenses.base import AdaptiveAttack
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.victim import VictimModel


def adaptive_specs(victim: VictimModel, attack: AttackConfig, settings: EvaluationConfig) -> list[AttackSpec]:
    """The rows that suites ``paper`` and ``rigorous`` have for this victim alone, against fresh draws."""
    if not settings.thorough:
        return []
    return [_spec(known, victim.randomized, attack, settings) for known in victim.adaptive]


def _spec(known: AdaptiveAttack, randomized: bool, attack: AttackConfig, settings: EvaluationConfig) -> AttackSpec:
    steps = settings.steps or known.steps
    own = known.step is not None and settings.steps is None
    eot = (settings.eot or known.eot or 20) if randomized else 1
    return AttackSpec(
        "bpda" if known.gradient == "identity" else "pgd",
        randomness="fresh" if randomized else "none",
        norm=attack.norm,
        epsilon=attack.epsilon,
        steps=steps,
        step_size=attack.epsilon * known.step if own and known.step is not None else attack.step_for(steps),
        restarts=settings.restarts or 1,
        eot=eot,
        draws=(settings.draws or 20) if randomized else 1,
        label=f"{known.name}{steps}-eot{eot}" if randomized else f"{known.name}{steps}",
    )
