"""Is it only hiding gradients? A verdict of rows, each with the accuracies it rests on (Athalye et al. 2018,
Carlini et al. 2019). Comparisons are paired, image by image, so that noise alone flags nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.marks import DEAD, Seen

RADII = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Radii of the curve, in units of the threat's own."""
SLACK = 0.02
"""A change below two points is none."""
HARM = 0.05
"""Accuracy that random noise may cost."""
LUCK = 0.10
"""Robust accuracy that may vanish once the draws are known."""
LOSS = 0.05
"""Accuracy that the margin loss may take from honest logits: it is the better loss by a few points."""
STRAY = 0.20
"""Share of images where the loss may move otherwise than the gradient says: kinks and rounding."""
ALIKE = {
    "recorded": "Are the logits the same while gradients are recorded?",
    "company": "Are an image's logits the same whatever images pass beside it?",
    "numbers": "Are an image's logits the same however many images pass together?",
    "repeats": "Are the logits of a module that seems deterministic the same at every call?",
}
"""Probes that all images must pass, by name, with what they ask."""


@dataclass(frozen=True)
class Check:
    """One row of the verdict."""

    question: str
    passed: bool
    answer: str
    """What was seen, in numbers."""
    evidence: dict[str, float]
    """The accuracies, by what was done."""


def check_specs(
    attack: AttackConfig, settings: EvaluationConfig, *, randomized: bool, transfers: bool, rows: bool = True
) -> dict[str, AttackSpec]:
    """The attacks and probes that the verdict needs, by a name of their own.

    ``rows`` says whether what is drawn does not depend on how many images pass together.
    "epsilon 1" is the whole pixel range, whatever the norm of the threat; the radii of an L2 threat are "L2 epsilon R".
    """
    eot = (settings.eot or 16) if randomized else 1
    steps = settings.steps or 20
    base = AttackSpec(
        "pgd",
        randomness="fresh" if randomized else "none",
        norm=attack.norm,
        epsilon=attack.epsilon,
        step_size=attack.step_for(steps),
        steps=steps,
        eot=eot,
        draws=(settings.draws or 10) if randomized else 1,
        first=settings.verdict_images,
    )
    specs = {"natural": replace(base, attack="natural", epsilon=0.0, steps=0, eot=1)}
    for radius in RADII:
        epsilon, step = radius * attack.epsilon, radius * attack.step_for(steps)
        specs[f"{_radii(base)}{epsilon:.4g}"] = replace(base, epsilon=epsilon, step_size=step)
    specs["epsilon 1"] = replace(base, norm="linf", epsilon=1.0, step_size=0.1, steps=2 * steps)
    for count in sorted({max(1, steps // 4), max(1, steps // 2), steps, 2 * steps, 4 * steps}):
        specs[f"{count} steps"] = replace(base, steps=count, step_size=attack.step_for(count))
    for count in (1, 4):
        specs[f"{count} restarts"] = replace(base, restarts=count)
    if randomized:
        for count in sorted({1, max(1, eot // 4), eot, 2 * eot}):
            specs[f"EOT {count}"] = replace(base, eot=count)
        specs["draws known"] = replace(base, randomness="fixed", eot=1)
    specs["margin loss"] = replace(base, loss="margin")
    specs["one step"] = replace(base, attack="fgsm", steps=1, step_size=attack.epsilon)
    specs["random noise"] = replace(base, attack="noise", steps=0, eot=1)
    specs["square"] = replace(base, attack="square", steps=max(1, settings.queries // 5), eot=min(eot, 4))
    if transfers:
        specs["transfer"] = replace(base, on="target", eot=1)
    specs["gradients"] = replace(base, attack="gradient", steps=0, draws=1)
    asked = ["slope", "recorded", "company", *(["numbers"] if rows else []), *([] if randomized else ["repeats"])]
    for name in asked:
        specs[name] = replace(base, attack=name, steps=0, eot=1, draws=1)
    return specs


def _radii(spec: AttackSpec) -> str:
    """How the names of cases begin whose radius varies."""
    return "epsilon " if spec.norm == "linf" else "L2 epsilon "


def checks(
    specs: dict[str, AttackSpec],
    shares: Callable[[AttackSpec], Tensor],
    met: Callable[[AttackSpec], Seen] = lambda spec: Seen(),
) -> list[Check]:
    """The rows, from each attack's accuracy image by image, (N,), and from what it met on its way."""
    found = _Found(specs, {name: shares(spec) for name, spec in specs.items()})
    return [
        *_by_radius(found),
        *_converged(found),
        *_no_weaker(found),
        *_harmless(found),
        *_guided(found, met),
        *_alike(found),
        *_without_luck(found),
    ]


@dataclass(frozen=True)
class _Found:
    """What the attacks of a verdict left, by their names."""

    specs: dict[str, AttackSpec]
    shares: dict[str, Tensor]
    """Accuracy image by image, (N,)."""

    @property
    def own(self) -> str:
        """The white box that others are compared with."""
        return f"{self.specs['1 restarts'].steps} steps"

    def mean(self, name: str) -> float:
        return self.shares[name].mean().item()

    def gain(self, name: str, over: str) -> float:
        """By how much ``name`` is surely above ``over``: the lower end of the paired 95 % interval, 0 at least."""
        moved = self.shares[name] - self.shares[over]
        spread = moved.std().item() / len(moved) ** 0.5 if len(moved) > 1 else 0.0
        return max(0.0, moved.mean().item() - 1.96 * spread)

    def row(self, question: str, passed: bool, answer: str, *names: str) -> Check:
        return Check(question, passed, answer, {name: self.mean(name) for name in names})

    def percent(self, *names: str) -> str:
        return ", ".join(f"{name} {100 * self.mean(name):.1f} %" for name in names)


def _by_radius(found: _Found) -> Iterator[Check]:
    limit = max(0.01, 1.0 / len(found.shares["epsilon 1"])) + 1e-9
    left = (found.shares["epsilon 1"] > 0.5).double().mean().item()  # right in most draws: a lucky one leaves nothing
    nothing = left <= limit and found.mean("epsilon 1") <= max(limit, LUCK)
    yield found.row("Does a radius of 1 leave nothing?", nothing, found.percent("epsilon 1"), "epsilon 1")
    radii = _radii(found.specs["natural"])
    curve = ["natural", *(name for name in found.specs if name.startswith(radii) and name != "epsilon 1")]
    rises = [f"{b} above {a}" for a, b in pairwise(curve) if found.gain(b, a) > SLACK]
    answer = "; ".join(rises) or found.percent(*curve)
    yield found.row("Does accuracy fall as the radius grows?", not rises, answer, *curve, "epsilon 1")


def _converged(found: _Found) -> Iterator[Check]:
    for what, names in (
        ("steps", [name for name in found.specs if name.endswith(" steps")]),
        ("restarts", [name for name in found.specs if name.endswith(" restarts")]),
        ("EOT draws", [name for name in found.specs if name.startswith("EOT ")]),
    ):
        if len(names) > 1:
            settled = found.gain(names[-2], names[-1]) <= SLACK
            yield found.row(f"Has the attack converged in {what}?", settled, found.percent(*names), *names)


def _no_weaker(found: _Found) -> Iterator[Check]:
    """The white box beside what should find less than it."""
    for other, slack, question in (
        ("one step", SLACK, "Is many steps no weaker than one?"),
        ("margin loss", LOSS, "Is cross-entropy no weaker than a loss that the scale of the logits leaves alone?"),
        ("transfer", SLACK, "Is the white box no weaker than a transfer from another model?"),
        ("square", SLACK, "Is the white box no weaker than Square, which sees no gradient?"),
    ):
        if other in found.specs:
            weaker = found.gain(found.own, other) > slack
            yield found.row(question, not weaker, found.percent(other, found.own), other, found.own)


def _harmless(found: _Found) -> Iterator[Check]:
    both = ("natural", "random noise")
    harmless = found.gain(*both) <= HARM
    yield found.row("Is random noise of the same size harmless?", harmless, found.percent(*both), *both)


def _guided(found: _Found, met: Callable[[AttackSpec], Seen]) -> Iterator[Check]:
    """Whether attacks meet gradients that lead somewhere, and logits that are numbers."""
    specs, without = found.specs, 1 - found.mean("gradients")
    followed = (name for name in (found.own, "margin loss", "draws known") if name in specs)
    lost = max(met(specs[name]).share("gradient") for name in followed)
    yield found.row(
        "Do all images have a gradient?",
        max(without, lost) <= DEAD + 1e-9,
        f"none at {100 * without:.1f} % of images, nor at {100 * lost:.1f} % of an attack's passes",
        "gradients",
    )
    straight = found.mean("slope")
    answer = f"within a factor of 3 at {100 * straight:.1f} % of images"
    yield found.row("Does the loss move as its gradient says?", 1 - straight <= STRAY, answer, "slope")
    climbed = met(specs.get("draws known", specs[found.own]))
    below = climbed.share("ascent")
    yield Check(
        "Does an attack raise the loss that it follows?",
        not climbed.fallen(),
        f"it ended below its start at {100 * below:.1f} % of images",
        {"ended below": below},
    )
    broken = max(met(spec).share("finite") for spec in specs.values())
    yield Check(
        "Are all logits finite under attack?",
        broken == 0,
        f"NaN or infinity in up to {100 * broken:.1f} % of an attack's passes",
        {"not finite": broken},
    )


def _alike(found: _Found) -> Iterator[Check]:
    for name, question in ALIKE.items():
        if name in found.specs:
            share = found.mean(name)
            yield found.row(question, share == 1, f"at {100 * share:.1f} % of images", name)


def _without_luck(found: _Found) -> Iterator[Check]:
    known, own = "draws known", found.own
    if known in found.specs:
        gap = found.mean(own) - found.mean(known)
        answer = f"{100 * gap:+.1f} points rest on the draws being secret: {found.percent(known, own)}"
        yield found.row("Does robustness outlive its randomness?", found.gain(own, known) <= LUCK, answer, known, own)


def curves(
    specs: dict[str, AttackSpec], shares: Callable[[AttackSpec], Tensor]
) -> dict[str, list[tuple[float, float, int]]]:
    """Accuracy against radius, steps and EOT draws: name -> (x, accuracy, images), rising in x."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    for name, spec in specs.items():
        first, _, last = name.partition(" ")
        for axis, x in (
            ("epsilon", spec.epsilon if name == "natural" or name.startswith(_radii(specs["natural"])) else None),
            ("steps", spec.steps if last == "steps" else None),
            ("EOT draws", spec.eot if first == "EOT" else None),
        ):
            if x is not None:
                share = shares(spec)
                found.setdefault(axis, []).append((float(x), share.mean().item(), len(share)))
    return {axis: sorted(points) for axis, points in found.items()}


def to_plain(rows: list[Check]) -> list[dict[str, Any]]:
    """Rows for JSON."""
    return [asdict(check) for check in rows]
