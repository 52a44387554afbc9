"""Evaluates a module against a suite and returns a report as one value."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dircluster.attacks.gradient import Model, Objective, value_and_grad
from dircluster.attacks.threat import BALLS
from dircluster.config import AttackConfig, ConfigError, EvaluationConfig, digest, require
from dircluster.defenses.base import Defended, unwrapped
from dircluster.evaluation import gradient_masking
from dircluster.evaluation.adapter import Adapted, buffers_kept, default_place, undisturbed, without_inference
from dircluster.evaluation.adaptive import adaptive_specs
from dircluster.evaluation.attack_table import CONTROLS, AttackSpec, check_fits, find_attack
from dircluster.evaluation.evaluation import EvalShard, Evaluation, run
from dircluster.evaluation.inputs import as_images, as_labels, as_number, as_whole_number, shown
from dircluster.evaluation.marks import ENOUGH, Mark, shared_marks
from dircluster.evaluation.meeting import meet
from dircluster.evaluation.provenance import facts_of, module_digest, results_folder
from dircluster.evaluation.results import Result, to_plain
from dircluster.evaluation.sample import class_notes, judged_rows
from dircluster.evaluation.store import FolderStore, MemoryStore, ResultStore, StorePart
from dircluster.evaluation.suites import known_suite
from dircluster.evaluation.suites import suite as specs_of
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import device_of, parts_of, to_bytes, under_attack, unfinished
from dircluster.models.precision import exact


@dataclass(frozen=True)
class Plan:
    """What a defense will face: the rows of the table, and the attacks behind the verdict."""

    table: list[AttackSpec]
    checks: dict[str, AttackSpec] = field(default_factory=dict)

    @property
    def specs(self) -> list[AttackSpec]:
        """All of them, each once, and the controls of the table's."""
        controls = [control for spec in self.table for kind in CONTROLS if (control := spec.control(kind))]
        return list(dict.fromkeys([*self.table, *controls, *self.checks.values()]))


def plan(victim: VictimModel, attack: AttackConfig, settings: EvaluationConfig) -> Plan:
    """Suite ``settings.suite`` for a victim that has been met, with the verdict's attacks where it is asked for."""
    drawn, transfers = victim.randomized, victim.source is not None
    purifies = victim.target is not None
    table = specs_of(
        settings.suite,
        attack,
        settings,
        randomized=drawn,
        purifies=purifies,
        transfers=transfers,
        masked=victim.masked,
    )
    table = list(dict.fromkeys([*table, *adaptive_specs(victim, attack, settings)]))
    asked = (
        gradient_masking.check_specs(
            attack, settings, randomized=drawn, transfers=transfers, rows=victim.drawn or not drawn
        )
        if settings.verdict
        else {}
    )
    return Plan(table, asked)


def with_attacks(planned: Plan, attacks: Sequence[AttackSpec], victim: VictimModel) -> Plan:
    """``planned`` with more rows. Raises ConfigError where the victim cannot meet one of them."""
    for spec in attacks:
        if not isinstance(spec, AttackSpec):
            raise ConfigError(f"attacks must be specs (evaluation.attack_table.AttackSpec), got {shown(spec)}")
        lacking = find_attack(spec.attack).needs - victim.offers
        if lacking:
            raise ConfigError(
                f"attack {spec.name} needs {', '.join(sorted(lacking))}, which {victim.name} does not have"
            )
        for name in find_attack(spec.attack).unread:
            usual = getattr(AttackSpec(spec.attack), name)
            require(
                getattr(spec, name) == usual,
                f"attack {spec.name} does not read {name}: leave it {usual}, got {getattr(spec, name)}",
            )
        if (spec.bare and victim.target is None) or (spec.on == "target" and victim.source is None):
            raise ConfigError(f"attack {spec.name} needs a target to craft on: give a purifier, or a surrogate")
        if not spec.bare and victim.randomized != (spec.randomness != "none"):
            forms = "fixed or fresh" if victim.randomized else "none"
            raise ConfigError(f"attack {spec.name} has randomness {spec.randomness}, but {victim.name} needs {forms}")
        check_fits(spec, victim)
    return dataclasses.replace(planned, table=list(dict.fromkeys([*planned.table, *attacks])))


def evaluation_of(
    planned: Plan,
    victim: VictimModel,
    images: int,
    seed: int,
    settings: EvaluationConfig,
    store: ResultStore,
    bare_store: ResultStore | None = None,
) -> Evaluation:
    """The evaluation of all that is planned for ``victim`` on so many images, by ``settings``."""
    size, rows, precision = settings.batch_size, settings.rows, settings.precision
    return Evaluation(planned.specs, images, seed, size, rows, store, victim, precision, bare_store)


def stores_of(
    victim: VictimModel, facts: Mapping[str, Any], storage: Path, keep_images: bool = False
) -> tuple[FolderStore, FolderStore | None]:
    """Where in ``storage`` the results of an evaluation with ``facts`` lie: of the victim, and of its bare target.

    The second is the same for all defenses over one target; None where the victim is no such defense.
    """
    own, module = FolderStore(results_folder(storage, victim.name, facts), keep_images), victim.module
    if not isinstance(module, Defended):
        return own, None
    bare = {**facts, "defense": module_digest(module.classifier), "surrogate": None}
    return own, FolderStore(results_folder(storage, "target", bare), keep_images)


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found, with its evidence."""

    defense: str
    suite: str
    rows: list[Result]
    verdict: list[gradient_masking.Check]
    curves: dict[str, list[tuple[float, float, int]]]
    """Accuracy against epsilon, steps and EOT draws: (x, accuracy, images)."""
    seed: int
    seconds: list[float]
    """One worker's time for each row."""
    table: list[AttackSpec]
    """The attack of each row."""
    evaluation: Evaluation = field(repr=False, compare=False)
    """What came of every image."""
    notes: list[str] = field(default_factory=list)
    """How the module and its images were taken, where that had to be guessed; classes that the images lack."""

    @property
    def flags(self) -> list[gradient_masking.Check]:
        """The rows of the verdict that the defense did not pass."""
        return [check for check in self.verdict if not check.passed]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "defense": self.defense,
            "suite": self.suite,
            "seed": self.seed,
            "seconds": [round(each, 1) for each in self.seconds],
            "rows": to_plain(self.rows),
            "verdict": gradient_masking.to_plain(self.verdict),
            "notes": self.notes,
            "curves": {axis: [list(point) for point in points] for axis, points in self.curves.items()},
        }

    def __str__(self) -> str:
        from dircluster.evaluation.model_card import markdown_table

        lines = [f"note: {note}" for note in self.notes]
        lines += [markdown_table(to_plain(self.rows))]
        lines += [f"{'passed ' if f.passed else 'FLAGGED'}  {f.question} {f.answer}" for f in self.verdict]
        return "\n".join(lines)


def report(evaluation: Evaluation, planned: Plan, defense: str, settings: EvaluationConfig) -> EvaluationReport:
    """The table and the verdict of an evaluation whose shards are all finished."""
    rows = [dataclasses.replace(evaluation.result(spec, defense), sample=settings.sample) for spec in planned.table]
    return EvaluationReport(
        defense,
        settings.suite,
        _marked(rows, planned.table, evaluation),
        gradient_masking.checks(planned.checks, evaluation.shares, evaluation.seen) if planned.checks else [],
        gradient_masking.curves(planned.checks, evaluation.shares),
        evaluation.seed,
        [evaluation.seconds(spec) for spec in planned.table],
        planned.table,
        evaluation,
        list(evaluation.victim.notes),
    )


def _marked(rows: list[Result], specs: Sequence[AttackSpec], evaluation: Evaluation) -> list[Result]:
    """``rows``, each with what another row has shown of the gradient that both follow, or of what all are answered."""
    made, groups = list(rows), dict[tuple[str, str], list[int]]()
    constant = {spec.judged for row, spec in zip(rows, specs, strict=True) if _is_constant(row, spec, evaluation)}
    for number, spec in enumerate(specs):
        if find_attack(spec.attack).own_gradient and evaluation.seen(spec).counts.get("gradient"):
            groups.setdefault((spec.on, spec.judged), []).append(number)
    for group in groups.values():
        marks = shared_marks([(rows[number].attack, rows[number].marks) for number in group])
        for number, found in zip(group, marks, strict=True):
            made[number] = dataclasses.replace(rows[number], marks=found)
    same = Mark("constant", 1.0)
    return [
        dataclasses.replace(row, marks=(*row.marks, same)) if spec.judged in constant else row
        for row, spec in zip(made, specs, strict=True)
    ]


def _is_constant(row: Result, spec: AttackSpec, evaluation: Evaluation) -> bool:
    """Whether a row of natural images got the same class for all of them, where their labels are not all that one."""
    if spec.attack != "natural" or row.total < ENOUGH or row.correct == row.judged:
        return False
    known = evaluation.predicted(spec).values()  # none where right in all draws is what counts
    return bool(known) and all(len(torch.unique(classes)) == 1 for classes in known)


def evaluate(
    module: Callable[..., Any],
    images: Any,
    labels: Any,
    suite: str = "quick",
    *,
    verdict: bool = False,
    epsilon: Any = 8 / 255,
    norm: Literal["linf", "l2"] = "linf",
    step_size: Any = None,
    settings: EvaluationConfig | None = None,
    seed: int = 0,
    name: str = "defense",
    surrogate: Callable[..., Any] | None = None,
    attacks: Sequence[AttackSpec] = (),
    store: ResultStore | None = None,
    on_shard: Callable[[EvalShard, int, int], None] = lambda shard, done, total: None,
) -> EvaluationReport:
    """Judge any module or function of images (N, C, H, W) in [0, 1] -> logits (N, classes), on the device it lies on.

    ``images`` with ``labels`` (N,), as tensors, arrays or lists; ``epsilon``, ``norm`` and ``step_size`` are those of
    AttackConfig, as numbers or as "8/255"; ``suite`` is quick, autoattack, paper or rigorous, and ``verdict`` asks
    whether the module only hides gradients. Transfers are crafted on ``surrogate``, or on a purifier's own classifier.
    ``attacks`` are met besides those of the suite, such as one of your own (see attack_table.ATTACKS). ``store`` keeps
    finished shards, each evaluation's apart, so that one of the same module, images and seed can go on; ``on_shard`` is
    called before each shard with the shards done and open. What had to be guessed, such as which part of a tuple is the
    logits, stands in the report's ``notes``; so do classes that the judged images lack because images lie in the order
    of their classes.

    Modules are judged in eval mode. They come back with the modes, flags, gradients and buffers, and on the device,
    that they came with; images and random streams are left as they are. Raises ConfigError, one line, for images out
    of range, labels out of the classes, an empty set, an unknown suite or norm, and a module that returns
    probabilities, NaN or another shape, or cannot be differentiated.
    """
    given = EvaluationConfig() if settings is None else settings
    chosen = dataclasses.replace(given, suite=known_suite(suite), verdict=verdict or given.verdict)
    if not isinstance(name, str) or name in ("", "none"):
        raise ConfigError(f"name must be a text, and none is the bare target's, got {shown(name)}")
    if norm not in tuple(BALLS):
        raise ConfigError(f"norm must be {' or '.join(BALLS)}, got {shown(norm)}")
    seed = as_whole_number("seed", seed)
    step = None if step_size is None else as_number("step_size", step_size)
    attack = AttackConfig(epsilon=as_number("epsilon", epsilon), step_size=step, norm=norm)
    place = default_place()
    with undisturbed():
        pixels, notes = as_images(images)
        rows = judged_rows(len(pixels), chosen)
        given_labels = as_labels(labels, len(pixels))
        notes += class_notes(given_labels, chosen)
        pixels, classes = pixels[rows], given_labels[rows]
        judged = _taken(module, "the defense", place)
        other = None if surrogate is None else _taken(surrogate, "the surrogate", place)
        device = device_of(judged) if parts_of(judged) else pixels.device
        if other is not None and parts_of(other) and device_of(other) != device:
            other = copy.deepcopy(other).to(device)  # the caller's stays where it is
        victim = VictimModel(judged, name, other)
        facts = None if store is None else _facts(victim, pixels, classes, seed, chosen)
        kept: ResultStore = MemoryStore()
        with buffers_kept(*victim.modules), torch.autocast(device.type, enabled=False):
            meet(victim, pixels[:8].to(device), int(classes.max()))
            victim.notes[:0] = notes
            if store is not None:
                kept = StorePart(store, digest([facts, *_answers(victim, pixels[:8].to(device))])[:12])
            planned = with_attacks(plan(victim, attack, chosen), attacks, victim)
            evaluation = evaluation_of(planned, victim, len(pixels), seed, chosen, kept)
            run(evaluation, lambda a, b: (pixels[a:b].to(device), classes[a:b].to(device)), on_shard)
            return report(evaluation, planned, name, chosen)


def _facts(
    victim: VictimModel, images: Tensor, labels: Tensor, seed: int, settings: EvaluationConfig
) -> dict[str, Any]:
    """What decides an evaluation but for its attacks and the code: modules, images, seed, shards."""

    data = hashlib.sha256(to_bytes(images) + to_bytes(labels)).hexdigest()
    other = None if victim.surrogate is None else module_digest(victim.surrogate)
    return facts_of(module_digest(victim.module), data, len(images), seed, settings, other)


def _answers(victim: VictimModel, images: Tensor) -> list[Any]:
    """What somebody's modules say of ``images`` (N, C, H, W), coarsely, and by what gradient: functions, and what is no
    weight, tell nothing else of themselves. Nothing of what is this package's.
    """
    models = [] if isinstance(victim.module, Defended) else [victim.model("fixed" if victim.randomized else "none", 0)]
    if victim.surrogate is not None and victim.source is not None:
        models.append(victim.source)
    made: list[Any] = []
    with under_attack(*victim.modules), exact(images.device):
        for model in models:
            steep = value_and_grad(_spread(model))(images)[1]
            for found in (model(images).detach(), steep):
                peak = found.double().abs().amax().clamp_min(1e-30)
                made += [round(4 * math.log2(peak)), (64 * found.double() / peak).round().int().tolist()]
    return made


def _spread(model: Model) -> Objective:
    """A loss to whose gradient all logits contribute, each otherwise: (N, C, H, W) -> (N,)."""

    def loss(images: Tensor) -> Tensor:
        logits = model(images).float()
        return (logits * torch.linspace(-1, 1, logits.shape[1], device=logits.device)).sum(dim=1)

    return loss


def _taken(module: Any, called: str, place: torch.device | None) -> Defended | Adapted:
    """The defense, or anybody's module as one that is judged; a copy where no gradient can pass it as it is."""
    given = unwrapped(module) if called == "the defense" else module
    made = given if isinstance(given, Defended) and called == "the defense" else Adapted(given, called, place)
    if wrong := unfinished(made):
        raise ConfigError(f"{called} {wrong}")
    return without_inference(made) if isinstance(given, nn.Module) else made
