"""Suites: which attacks a defense must face, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from dircluster.config import AttackConfig, ConfigError, EvaluationConfig
from dircluster.evaluation.attack_table import ATTACKS, AttackSpec, attack_of
from dircluster.evaluation.marks import in_words

SuiteName = Literal["quick", "paper", "rigorous"]
SUITES: tuple[SuiteName, ...] = ("quick", "paper", "rigorous")


def known_suite(name: str) -> SuiteName:
    """``name``, if there is such a suite. Raises ConfigError otherwise."""
    for fixed in SUITES:
        if name == fixed:
            return fixed
    raise ConfigError(f"there is no suite {name!r}; choose {', '.join(SUITES)}")


def suite(
    name: SuiteName,
    attack: AttackConfig,
    settings: EvaluationConfig,
    *,
    randomized: bool,
    purifies: bool,
    transfers: bool,
    masked: bool,
) -> list[AttackSpec]:
    """The attacks of suite ``name`` for a defense of this kind.

    ``quick``: seconds. ``paper``: Tables 1 and 3, Eq. 8 and 9. ``rigorous``: what a strong reviewer adds.
    """
    eot = (settings.eot or (8 if name == "quick" else 20)) if randomized else 1
    draws = (settings.draws or (10 if name == "quick" else 20)) if randomized else 1
    ball = AttackSpec("pgd", norm=attack.norm, epsilon=attack.epsilon, draws=draws)
    ball = _lasting(ball, attack, settings.steps or 20)
    restarts = settings.restarts or 1
    fixed = replace(ball, randomness="fixed") if randomized else ball
    fresh = replace(ball, randomness="fresh", eot=eot) if randomized else ball
    bare = replace(ball, on="target", judged="target", draws=1)

    specs = [_natural(bare), bare] if purifies else []
    specs += [_natural(fixed), _natural(fresh)]
    if name == "quick":
        specs += [replace(fixed, restarts=restarts), replace(fresh, restarts=restarts), _margin(fixed)]
        specs += [replace(fresh, on="target", eot=1)] if transfers else []
    elif name == "paper":
        specs += _paper(fixed, fresh, attack, settings, masked)
    else:
        steps = settings.steps or 200
        long = _lasting(fresh, attack, steps)
        specs += [
            replace(_lasting(fixed, attack, steps), restarts=settings.restarts or 2),
            *([replace(long, restarts=restarts)] if randomized else []),
            _margin(long),
            *_autoattack(fixed, settings, masked),
            replace(fresh, attack="square", steps=settings.queries),
        ]
        if attack.norm == "linf":  # an L2 threat has been met already
            radius = settings.l2_epsilon
            step_size = radius * attack.step_for(steps) / attack.epsilon
            specs += [replace(long, norm="l2", epsilon=radius, step_size=step_size, label=f"l2-pgd{steps}")]
        if randomized:
            best = replace(fresh, eot=1, average=eot)
            specs += [
                replace(fresh, attack="autoattack", label="autoattack-rand", steps=0),
                replace(_natural(best), label=f"natural-mean-of-{eot}"),
                replace(_lasting(best, attack, steps), label=f"pgd{steps}-mean-of-{eot}"),
            ]
        specs += [replace(long, on="target", eot=1)] if transfers else []
    has = {name for name, there in (("purifier", purifies), ("masks", masked)) if there}
    return [spec for spec in dict.fromkeys(specs) if ATTACKS[spec.attack].needs <= has]


def _natural(spec: AttackSpec) -> AttackSpec:
    return replace(spec, attack="natural", epsilon=0.0, steps=0, step_size=0.0, eot=1)


def _lasting(spec: AttackSpec, attack: AttackConfig, steps: int) -> AttackSpec:
    """The case with ``steps`` steps of the size that goes with them."""
    return replace(spec, steps=steps, step_size=attack.step_for(steps))


def _margin(spec: AttackSpec) -> AttackSpec:
    """The same by a loss that does not depend on the scale of the logits, as cross-entropy does."""
    return replace(spec, loss="margin", label=f"{spec.name}-margin")


def _autoattack(fixed: AttackSpec, settings: EvaluationConfig, masked: bool) -> list[AttackSpec]:
    """AutoAttack standard, unless it would meet other draws than it is judged on: it passes some images alone."""
    if fixed.randomness == "fixed" and not masked:
        return []
    return [replace(fixed, attack="autoattack", label="autoattack-standard", steps=settings.queries)]


def _paper(
    fixed: AttackSpec, fresh: AttackSpec, attack: AttackConfig, settings: EvaluationConfig, masked: bool
) -> list[AttackSpec]:
    forty, eot = settings.steps or 40, fresh.eot
    restarts = settings.restarts or 1
    restored = replace(fixed, attack="restored", label=f"restored{fixed.steps}-from-natural")
    return [
        replace(fixed, restarts=restarts),
        replace(fresh, restarts=restarts),
        _margin(fixed),
        *_autoattack(fixed, settings, masked),
        replace(fixed, attack="mifgsm"),
        replace(fresh, attack="mifgsm"),
        replace(fixed, attack="vnifgsm"),
        *(
            replace(_lasting(form, attack, forty), attack="masked", eot=1, label=f"masked{forty}")
            for form in (fixed, fresh)
        ),
        replace(_lasting(fresh, attack, forty), attack="bpda", label=f"bpda{forty}-eot{eot}"),
        restored,
        replace(restored, source="adversarial", label=f"restored{fixed.steps}-from-adversarial"),
    ]


def how(row: Mapping[str, Any], draws: bool = True) -> str:
    """The evidence of a row in a few words, with what its ``draws`` showed unless columns say so."""
    parts = []
    if row["epsilon"]:
        ball = f"{'L2 ' if row['norm'] == 'l2' else ''}eps {row['epsilon']:.4g}"
        found = attack_of(row["attack"])
        counted = f"steps of {row['step_size']:.3g}" if row["step_size"] else found.counts if found else "steps"
        parts.append(f"{ball}, {row['steps']} {counted}" if row["steps"] else ball)
    for key, name in (("restarts", "restarts"), ("eot", "EOT"), ("average", "logits averaged over")):
        if row[key] > 1:
            parts.append(f"{name} {row[key]}")
    if row.get("crafting", "fp32") != "fp32":
        parts.append(f"crafted in {row['crafting']}")
    if draws and row["draws"] > 1:
        mean = f"mean {100 * row['mean']:.1f}, " if row["randomness"] == "fixed" else ""
        parts.append(
            f"of {row['draws']} fresh draws {mean}worst {100 * row['worst']:.1f}, all {100 * row['always']:.1f} %"
        )
    if row.get("marks"):
        parts.append(f"**marked**: {in_words(row['marks'])}")
    return "; ".join(parts)
