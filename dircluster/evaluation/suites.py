"""Suites: which attacks a defense must face, as plain data. A spec is one attack and how its images are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from dircluster.config import AttackConfig, ConfigError, EvaluationConfig

SuiteName = Literal["quick", "paper", "rigorous"]
SUITES: tuple[SuiteName, ...] = ("quick", "paper", "rigorous")
Randomness = Literal["none", "fixed", "fresh"]


@dataclass(frozen=True)
class AttackSpec:
    """One attack on one form of the defense. Radii and steps are in units of the pixel range."""

    attack: str
    """natural, noise, fgsm, pgd, mifgsm, vnifgsm, autoattack, square, masked, bpda, or restored."""
    randomness: Randomness = "none"
    """Random draws, known to the attacker (fixed) or new at every pass (fresh); none where nothing is random."""
    on: Literal["defense", "target"] = "defense"
    """What the attacker crafts on; what is crafted elsewhere and judged on the defense is a transfer."""
    judged: Literal["defense", "target"] = "defense"
    norm: Literal["linf", "l2"] = "linf"
    epsilon: float = 0.0
    steps: int = 0
    """Steps, or queries of square."""
    step_size: float = 0.0
    restarts: int = 1
    eot: int = 1
    """Draws over which each step's gradient, or loss, is averaged."""
    loss: Literal["ce", "margin"] = "ce"
    source: Literal["natural", "adversarial"] = "natural"
    """Where the attack on the restored image starts."""
    draws: int = 1
    """Fresh draws on which every final image is judged."""
    average: int = 1
    """Draws whose logits the defense averages before it answers; the attacker's too."""
    first: int | None = None
    """Judged on so many images alone."""
    label: str = ""
    """What the table calls it, if not its attack and steps."""

    @property
    def name(self) -> str:
        """What the table calls it: pgd20, transfer-pgd20, autoattack-rand, ..."""
        if self.label:
            return self.label
        plain = f"{self.attack}{self.steps}" if self.attack in ("pgd", "mifgsm", "vnifgsm") else self.attack
        if self.on == "target" and self.judged == "defense":
            plain = f"transfer-{plain}"
        return plain


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
        specs += [replace(fixed, restarts=restarts), replace(fresh, restarts=restarts)]
        specs += [replace(fresh, on="target", eot=1)] if transfers else []
    elif name == "paper":
        specs += _paper(fixed, fresh, attack, settings, purifies=purifies, masked=masked)
    else:
        steps = settings.steps or 200
        long = _lasting(fresh, attack, steps)
        specs += [
            replace(_lasting(fixed, attack, steps), restarts=settings.restarts or 2),
            *([replace(long, restarts=restarts)] if randomized else []),
            replace(long, loss="margin", label=f"pgd{steps}-margin"),
            *_autoattack(fixed, settings, masked),
            replace(fresh, attack="square", steps=settings.queries),
        ]
        if attack.norm == "linf":  # an L2 threat has been met already
            radius = settings.l2_epsilon
            step_size = radius * attack.step / attack.epsilon
            specs += [replace(long, norm="l2", epsilon=radius, step_size=step_size, label=f"l2-pgd{steps}")]
        if randomized:
            best = replace(fresh, eot=1, average=eot)
            specs += [
                replace(fresh, attack="autoattack", label="autoattack-rand", steps=0),
                replace(_natural(best), label=f"natural-mean-of-{eot}"),
                replace(_lasting(best, attack, steps), label=f"pgd{steps}-mean-of-{eot}"),
            ]
        specs += [replace(long, on="target", eot=1)] if transfers else []
    return list(dict.fromkeys(specs))


def _natural(spec: AttackSpec) -> AttackSpec:
    return replace(spec, attack="natural", epsilon=0.0, steps=0, step_size=0.0, eot=1)


def _lasting(spec: AttackSpec, attack: AttackConfig, steps: int) -> AttackSpec:
    """The case with ``steps`` steps of the size that goes with them."""
    return replace(spec, steps=steps, step_size=attack.step_for(steps))


def _autoattack(fixed: AttackSpec, settings: EvaluationConfig, masked: bool) -> list[AttackSpec]:
    """AutoAttack standard, unless it would meet other draws than it is judged on: it passes some images alone."""
    if fixed.randomness == "fixed" and not masked:
        return []
    return [replace(fixed, attack="autoattack", label="autoattack-standard", steps=settings.queries)]


def _paper(
    fixed: AttackSpec,
    fresh: AttackSpec,
    attack: AttackConfig,
    settings: EvaluationConfig,
    *,
    purifies: bool,
    masked: bool,
) -> list[AttackSpec]:
    forty, eot = settings.steps or 40, fresh.eot
    restarts = settings.restarts or 1
    specs = [
        replace(fixed, restarts=restarts),
        replace(fresh, restarts=restarts),
        *_autoattack(fixed, settings, masked),
        replace(fixed, attack="mifgsm"),
        replace(fresh, attack="mifgsm"),
        replace(fixed, attack="vnifgsm"),
    ]
    if masked:
        both = [_lasting(m, attack, forty) for m in (fixed, fresh)]
        specs += [replace(m, attack="masked", eot=1, label=f"masked{forty}") for m in both]
    if purifies:
        specs += [replace(_lasting(fresh, attack, forty), attack="bpda", label=f"bpda{forty}-eot{eot}")]
        restored = replace(fixed, attack="restored", label=f"restored{fixed.steps}-from-natural")
        label = f"restored{fixed.steps}-from-adversarial"
        specs += [restored, replace(restored, source="adversarial", label=label)]
    return specs


def how(row: Mapping[str, Any], draws: bool = True) -> str:
    """The evidence of a row in a few words, with what its ``draws`` showed unless columns say so."""
    parts = []
    if row["epsilon"]:
        ball = f"{'L2 ' if row['norm'] == 'l2' else ''}eps {row['epsilon']:.4g}"
        counted = "queries of Square" if row["step_size"] == 0 else f"steps of {row['step_size']:.3g}"
        parts.append(f"{ball}, {row['steps']} {counted}" if row["steps"] else ball)
    for key, name in (("restarts", "restarts"), ("eot", "EOT"), ("average", "logits averaged over")):
        if row[key] > 1:
            parts.append(f"{name} {row[key]}")
    if draws and row["draws"] > 1:
        mean = f"mean {100 * row['mean']:.1f}, " if row["randomness"] == "fixed" else ""
        parts.append(
            f"of {row['draws']} fresh draws {mean}worst {100 * row['worst']:.1f}, all {100 * row['always']:.1f} %"
        )
    return "; ".join(parts)
