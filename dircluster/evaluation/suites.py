"""Suites: which attacks a defense must face, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from dircluster.config import AttackConfig, ConfigError, EvaluationConfig, SuiteName
from dircluster.evaluation.attack_table import ATTACKS, AttackSpec, attack_of
from dircluster.evaluation.marks import in_words

SUITES: tuple[SuiteName, ...] = get_args(SuiteName)
MEAN = 10
"""Draws whose logits ``paper`` averages into an answer, beside answers of one: EBM's authors verify by ten of its."""


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

    ``quick``: the cheapest that ends in a number of AutoAttack's grade. ``autoattack``: what RobustBench asks, of the
    bare target too, and PGD beside it. ``paper``: Tables 1 and 3, Eq. 8 and 9. ``rigorous``: what a strong reviewer
    adds. Of a randomized defense the deterministic white box leads: the attacker knows the draws. All end with MALT.
    """
    eot = (settings.eot or (4 if name == "quick" else 20)) if randomized else 1
    draws = (settings.draws or (10 if name == "quick" else 20)) if randomized else 1
    ball = AttackSpec("pgd", norm=attack.norm, epsilon=attack.epsilon, draws=draws)
    ball = _lasting(ball, attack, settings.steps or 20)
    restarts = settings.restarts or 1
    fixed = replace(ball, randomness="fixed") if randomized else ball
    fresh = replace(ball, randomness="fresh", eot=eot) if randomized else ball
    bare = replace(ball, on="target", judged="target", draws=1)

    last = [_malt(fixed, settings, name)]
    if name == "quick":
        known, unknown = [replace(fixed, restarts=restarts), _margin(fixed)], [replace(fresh, restarts=restarts)]
        last = [*([replace(fresh, on="target", eot=1)] if transfers else []), *last]
    elif name == "autoattack":
        standard = _autoattack(fixed, settings, masked)
        known, unknown = [replace(fixed, restarts=restarts), *standard], [replace(fresh, restarts=restarts)]
        unknown += [] if standard else [_autoattack_rand(fresh)]
    elif name == "paper":
        known, unknown = _paper(fixed, fresh, attack, settings, masked)
    else:
        steps = settings.steps or 200
        long = _lasting(fresh, attack, steps)
        known = [
            replace(_lasting(fixed, attack, steps), restarts=settings.restarts or 2),
            *_autoattack(fixed, settings, masked),
            replace(fixed, attack="pma", steps=settings.steps or 100, step_size=0.0),
        ]
        unknown = [
            *([replace(long, restarts=restarts)] if randomized else []),
            _margin(long),
            replace(fresh, attack="square", steps=settings.queries),
        ]
        if attack.norm == "linf":  # an L2 threat has been met already
            radius = settings.l2_epsilon
            step_size = radius * attack.step_for(steps) / attack.epsilon
            unknown += [replace(long, norm="l2", epsilon=radius, step_size=step_size, label=f"l2-pgd{steps}")]
        if randomized:
            best = replace(fresh, eot=1, average=eot)
            unknown += [
                _autoattack_rand(fresh),
                best.unattacked("natural"),
                replace(_lasting(best, attack, steps), label=f"pgd{steps}-mean-of-{eot}"),
            ]
        last = [*([replace(long, on="target", eot=1)] if transfers else []), *last]
    if randomized and replace(settings, suite=name).thorough:
        unknown += _protocols(fresh, settings)
    strong = [*(_autoattack(bare, settings, masked) if name == "autoattack" else []), _malt(bare, settings, name)]
    specs = [bare.unattacked("natural"), bare, *strong] if purifies else []
    specs += [fixed.unattacked("natural"), *known, fresh.unattacked("natural"), *unknown, *last]
    has = {name for name, there in (("purifier", purifies), ("masks", masked)) if there}
    return [spec for spec in dict.fromkeys(specs) if ATTACKS[spec.attack].needs <= has]


def _malt(spec: AttackSpec, settings: EvaluationConfig, name: SuiteName) -> AttackSpec:
    """MALT: as strong as AutoAttack, or nearly, at a tenth of its time; in ``quick`` with fewer steps a class."""
    return replace(spec, attack="malt", steps=settings.steps or (20 if name == "quick" else 30), step_size=0.0)


def _protocols(fresh: AttackSpec, settings: EvaluationConfig) -> list[AttackSpec]:
    """DiffBreak's: resubmission, where an attacker may try all draws at every step, and the majority vote."""
    tries, votes = settings.resubmissions or 10, settings.votes or 11
    wor = replace(fresh, protocol="wor", eot=tries, draws=tries, label=f"{fresh.name}-wor{tries}")
    mv = replace(fresh, protocol="mv", eot=1, average=votes, draws=max(1, fresh.draws // 4))
    return [wor, replace(mv, label=f"{fresh.name}-mv{votes}")]


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


def _autoattack_rand(fresh: AttackSpec) -> AttackSpec:
    """AutoAttack rand, for what draws again at every pass."""
    return replace(fresh, attack="autoattack", label="autoattack-rand", steps=0)


def _paper(
    fixed: AttackSpec, fresh: AttackSpec, attack: AttackConfig, settings: EvaluationConfig, masked: bool
) -> tuple[list[AttackSpec], list[AttackSpec]]:
    """The attacks under fixed and under fresh draws.

    PGD-100, 2.5 radii in all, tells what the larger steps of PGD-20 had left to find. It is left out where
    ``settings.steps`` is given: then all attacks have as many steps, and PGD is a row already. What a defense
    answers by the mean logits of several fresh draws is judged on natural images and on those of BPDA.
    """
    forty, eot = settings.steps or 40, fresh.eot
    restarts = settings.restarts or 1
    small = min(attack.step_for(100), 2.5 * attack.epsilon / 100)
    converged = [] if settings.steps else [replace(fixed, steps=100, step_size=small, restarts=restarts)]
    restored = replace(fixed, attack="restored", label=f"restored{fixed.steps}-from-natural")
    eq_8 = [
        replace(_lasting(form, attack, forty), attack="masked", eot=1, label=f"masked{forty}")
        for form in (fixed, fresh)
    ]
    known = [
        replace(fixed, restarts=restarts),
        *converged,
        _margin(fixed),
        *_autoattack(fixed, settings, masked),
        replace(fixed, attack="mifgsm"),
        replace(fixed, attack="vnifgsm"),
        eq_8[0],
        restored,
        replace(restored, source="adversarial", label=f"restored{fixed.steps}-from-adversarial"),
    ]
    bpda = replace(_lasting(fresh, attack, forty), attack="bpda")
    unknown = [
        replace(fresh, restarts=restarts),
        replace(fresh, attack="mifgsm"),
        eq_8[1],
        replace(bpda, label=f"bpda{forty}-eot{eot}"),
    ]
    if fresh.randomness == "fresh":
        mean = replace(bpda, eot=min(eot, MEAN), average=MEAN, draws=max(1, fresh.draws // 4))
        unknown += [mean.unattacked("natural"), replace(mean, label=f"bpda{forty}-mean-of-{MEAN}")]
    return known, unknown


def how(row: Mapping[str, Any], columns: bool = False) -> str:
    """The evidence of a row in a few words; draws, controls and marks are left out where ``columns`` show them."""
    parts = []
    if row["epsilon"]:
        ball = f"{'L2 ' if row['norm'] == 'l2' else ''}eps {row['epsilon']:.4g}"
        found = attack_of(row["attack"])
        counted = f"steps of {row['step_size']:.3g}" if row["step_size"] else found.counts if found else "steps"
        parts.append(f"{ball}, {row['steps']} {counted}" if row["steps"] else ball)
        if found and found.past_purifier:
            parts.append("around the restored image, another threat")
    named = row.get("protocol", "")
    wor, mv = named.startswith("Wor"), named.startswith("MV")
    if row["restarts"] > 1:
        parts.append(f"restarts {row['restarts']}")
    if row["eot"] > 1 and not wor:
        parts.append(f"EOT {row['eot']}")
    if row["average"] > 1:
        parts.append(f"majority of {row['average']} draws" if mv else f"logits averaged over {row['average']}")
    if wor:
        parts.append(f"any of {row['eot']} draws at any of {row['steps'] + 1} iterates may break an image")
    if row.get("crafting", "fp32") != "fp32":
        parts.append(f"crafted in {row['crafting']}")
    natural, noise = row.get("natural"), row.get("noise")
    if columns:
        return "; ".join(parts)
    if row["draws"] > 1:
        mean = f"mean {100 * row['mean']:.1f}, " if row["randomness"] == "fixed" else ""
        least = f" (natural {100 * natural['always']:.1f})" if natural else ""
        what = "votes" if mv else "fresh draws"
        shares = f"{mean}worst {100 * row['worst']:.1f}, all {100 * row['always']:.1f} %{least}"
        parts.append(f"of {row['draws']} {what} {shares}")
    if natural:
        noisy = f", noise {100 * noise['accuracy']:.1f}" if noise else ""
        parts.append(f"control natural {100 * natural['accuracy']:.1f}{noisy} %")
    if row.get("luck") is not None and row["randomness"] == "fresh":
        parts.append(f"luck {100 * row['luck']:.0f} % of the loss")
    if row.get("marks"):
        parts.append(f"**marked**: {in_words(row['marks'])}")
    return "; ".join(parts)
