"""The verb of this room: judge a module against a suite, and say what was found as one value."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation import gradient_masking
from dircluster.evaluation.evaluation import Judgement, Unit, run
from dircluster.evaluation.results import Result, to_plain
from dircluster.evaluation.store import Memory, Shelf
from dircluster.evaluation.suites import Case, known_suite
from dircluster.evaluation.suites import suite as cases_of
from dircluster.evaluation.victim import Subject, check_images
from dircluster.models.modules import device_of


@dataclass(frozen=True)
class Plan:
    """What a defense will face: the rows of the table, and the cases behind the verdict."""

    table: list[Case]
    sanity: dict[str, Case] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        """All of them, each once."""
        return list(dict.fromkeys([*self.table, *self.sanity.values()]))


def plan(subject: Subject, attack: AttackConfig, settings: EvaluationConfig) -> Plan:
    """Suite ``settings.suite`` for a subject that has been met, with the verdict's cases where it is asked for."""
    drawn, transfers = subject.randomised, subject.source is not None
    purifies = subject.target is not None
    table = cases_of(
        settings.suite,
        attack,
        settings,
        randomised=drawn,
        purifies=purifies,
        transfers=transfers,
        masked=subject.masked,
    )
    asked = (
        gradient_masking.sanity_cases(attack, settings, randomised=drawn, transfers=transfers)
        if settings.verdict
        else {}
    )
    return Plan(table, asked)


@dataclass(frozen=True)
class Report:
    """What a judgement found, with its evidence."""

    defense: str
    suite: str
    rows: list[Result]
    verdict: list[gradient_masking.Finding]
    curves: dict[str, list[tuple[float, float, int]]]
    """Accuracy against epsilon, steps and EOT draws: (x, accuracy, images)."""
    seed: int
    seconds: list[float]
    """One worker's time for each row."""

    @property
    def flags(self) -> list[gradient_masking.Finding]:
        """The rows of the verdict that the defense did not pass."""
        return [finding for finding in self.verdict if finding.passed is False]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "defense": self.defense,
            "suite": self.suite,
            "seed": self.seed,
            "seconds": [round(each, 1) for each in self.seconds],
            "rows": to_plain(self.rows),
            "verdict": gradient_masking.to_plain(self.verdict),
            "curves": {axis: [list(point) for point in points] for axis, points in self.curves.items()},
        }

    def __str__(self) -> str:
        from dircluster.evaluation.model_card import markdown_table

        said = [markdown_table(to_plain(self.rows))]
        said += [f"{'passed ' if f.passed else 'FLAGGED'}  {f.question} {f.answer}" for f in self.verdict]
        return "\n".join(said)


def report(judgement: Judgement, planned: Plan, defense: str, settings: EvaluationConfig) -> Report:
    """The table and the verdict of a judgement whose units are all finished."""
    return Report(
        defense,
        settings.suite,
        [judgement.result(case, defense) for case in planned.table],
        gradient_masking.verdict(planned.sanity, judgement.shares) if planned.sanity else [],
        gradient_masking.curves(planned.sanity, judgement.shares),
        judgement.seed,
        [judgement.seconds(case) for case in planned.table],
    )


def evaluate(
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    suite: str = "quick",
    *,
    verdict: bool = False,
    epsilon: float = 8 / 255,
    norm: Literal["linf", "l2"] = "linf",
    step_size: float | None = None,
    settings: EvaluationConfig | None = None,
    seed: int = 0,
    name: str = "defense",
    surrogate: nn.Module | None = None,
    shelf: Shelf | None = None,
    told: Callable[[Unit, int, int], None] = lambda unit, done, total: None,
) -> Report:
    """Judge any module that maps images (N, C, H, W) in [0, 1] to logits (N, classes), on the device it lies on.

    ``images`` with ``labels`` (N,) int64; ``epsilon``, ``norm`` and ``step_size`` are those of AttackConfig; ``suite``
    is quick, paper or rigorous, and ``verdict`` asks whether the module only hides gradients. Transfers are crafted on
    ``surrogate``, or on a purifier's own classifier. ``shelf`` keeps finished units, so that a judgement can go on;
    ``told`` is called before each unit with the units done and open. Modules are judged in eval mode, and come back in
    the modes, and on the device, that they came in. Raises ConfigError, one line, for images out of range, labels out
    of the classes, an empty set, an unknown suite, and a module that returns probabilities, NaN or another shape.
    """
    given = EvaluationConfig() if settings is None else settings
    chosen = dataclasses.replace(given, suite=known_suite(suite), verdict=verdict or given.verdict)
    attack = AttackConfig(epsilon=epsilon, step_size=step_size, norm=norm)
    check_images(images, labels)
    device = device_of(module)
    images, labels = images[: chosen.images].float(), labels[: chosen.images].long()
    if surrogate is not None and device_of(surrogate) != device:
        surrogate = copy.deepcopy(surrogate).to(device)  # the caller's stays where it is
    subject = Subject(module, name, surrogate)
    subject.meet(images[:8].to(device), int(labels.max()))
    planned = plan(subject, attack, chosen)
    shelf = Memory() if shelf is None else shelf
    judgement = Judgement(planned.cases, len(images), seed, chosen.batch_size, chosen.rows, shelf, subject)
    run(judgement, lambda a, b: (images[a:b].to(device), labels[a:b].to(device)), told)
    return report(judgement, planned, name, chosen)
