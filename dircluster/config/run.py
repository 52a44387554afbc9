"""One whole run, which is checked when it is made, and what of it the keys of stored stages hold."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, TypeVar

from dircluster.config.errors import refuse_secret, require
from dircluster.config.evaluation import EvaluationConfig
from dircluster.config.places import ParallelConfig, ScalingConfig, StorageConfig, TrackingConfig
from dircluster.config.sections import (
    AttackConfig,
    DataConfig,
    OptimizerConfig,
    TargetConfig,
    TrainingConfig,
)
from dircluster.config.serialize import flatten, to_dict, with_values

AnyRun = TypeVar("AnyRun", bound="RunConfig")
AnySection = TypeVar("AnySection")


@dataclass(frozen=True)
class RunConfig:
    """One whole run: the sections that all defenses share. Each defense adds its own in a subclass, see presets."""

    defense: ClassVar[str] = ""
    """Name of the defense in ``dircluster.defenses.table``, or the module that holds somebody's own."""
    crafting: ClassVar[tuple[str, ...]] = ("pgd",)
    """What ``attack.crafting`` may be: more where the defense is trained against attacks on its whole pipeline."""

    later: ClassVar[Mapping[str, Any]] = {}
    """As LATER_FIELDS, of the defense's own sections."""

    lengths: ClassVar[tuple[str, ...]] = ("attack.step_size", "attack.training_step_size")
    """Settings that are lengths like ``attack.epsilon``."""

    unread: ClassVar[tuple[str, ...]] = ()
    """Settings of ``target`` that nothing reads where ``target.uri`` gives one: a defense that names none reads all."""

    name: str = "digits"
    """Names the run and its model, DEFENSE-NAME; the preset's name unless given."""
    seed: int = 0
    """Every draw of the run follows from it."""
    data: DataConfig = DataConfig()
    attack: AttackConfig = AttackConfig()
    target: TargetConfig = TargetConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    scaling: ScalingConfig = ScalingConfig()
    parallel: ParallelConfig = ParallelConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"\w[\w .+=-]*", self.name) is not None and len(self.name) <= 100,
            "name must be of letters, digits and any of _ . + = - and spaces, and begin with one of the first three"
            f" (models and folders are called so), got {self.name!r}",
        )
        batch, workers = self.training.batch_size, self.scaling.most
        require(batch >= workers, f"training.batch_size must be at least scaling.workers {workers}, got {batch}")
        require(
            self.attack.crafting in self.crafting,
            f"attack.crafting {self.attack.crafting} needs a defense that is trained against attacks on its whole"
            f" pipeline; {self.defense or 'this one'} takes {' or '.join(self.crafting)}",
        )
        channels = self.data.channels
        for name, values in zip(("mean", "std"), self.target.normalization or (), strict=False):
            found = len(values)
            require(
                found in (1, channels),
                f"target.{name} has {found} values, but data.channels is {channels}: give as many, or one for all",
            )
        for name, optimizer, _ in _optimizers(self):
            optimizer.check(name)
        for name, value in flatten(to_dict(self)).items():
            require(not isinstance(value, float) or math.isfinite(value), f"{name} must be finite, got {value}")
            small = not isinstance(value, int) or abs(value) < 2 ** (63 if name == "seed" else 31)
            require(small, f"{name} is too large, got {value}")
            if isinstance(value, str):
                refuse_secret(name, value)
                control = re.search(r"[\0-\x1f\x7f-\x9f\ud800-\udfff]", value)
                require(control is None, f"{name} holds a character that cannot be shown, got {value!r}")
                bucket = not value.startswith("s3://") or re.match("s3://[a-z0-9]", value) is not None
                require(bucket, f"{name} must name a bucket, s3://BUCKET/PREFIX, got {value!r}")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers, as plain data in one form: everything but where it runs and what it tells."""
        plain = self.decisive
        return {k: v for k, v in plain.items() if k not in ("name", "scaling", "parallel", "storage", "tracking")}

    @property
    def decisive(self) -> dict[str, Any]:
        """The run in one form as plain data, as keys hold it: what has become ``auto`` or None is as it once was."""
        plain = to_dict(self.canonical)
        plain["training"]["compile"] = self.training.compiles
        plain["evaluation"]["rows"] = self.evaluation.usual_rows
        return plain

    @property
    def canonical(self: AnyRun) -> AnyRun:
        """The run that computes the same, in the form that its keys hold: a value given is as the same value derived,
        and what nothing reads is as it is by itself.

        A defense whose own sections derive values, or do not read some, overrides it.
        """
        target, evaluation = self.target.canonical, self.evaluation.canonical
        if self.target.uri is not None:
            target = as_by_itself(target, TargetConfig(), *self.unread)
        if self.attack.norm == "l2":  # the threat is an L2 ball already
            evaluation = as_by_itself(evaluation, EvaluationConfig(), "l2_epsilon")
        sections: dict[str, Any] = {
            "data": self.data.canonical,
            "attack": self.attack.canonical,
            "target": target,
            "training": self.training.canonical_under(self.attack),
            "evaluation": evaluation,
        }
        names = [each.name for each in fields(self)]
        return replace(self, **{name: _with_optimizers(sections.get(name, getattr(self, name))) for name in names})

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        """Percent that the defense's paper prints for such a run: by defense and attack as tables name them."""
        return {}

    def printed_ablation(self) -> tuple[float, float] | None:
        """Natural accuracy and that under PGD-20 that the paper prints where all but what it varies is its preset's."""
        return None


def with_lengths_of(run: AnyRun, usual: RunConfig, given: Container[str] = ()) -> AnyRun:
    """``run`` with those of its lengths that are not ``given`` as shares of its own radius, as they are ``usual``.

    In another norm they are what they are by themselves. Raises ConfigError where no step can be so long.
    """
    own, other = run.attack, usual.attack
    if (own.norm, own.epsilon) == (other.norm, other.epsilon):
        return run
    values = flatten(to_dict(usual))
    ratio = own.epsilon / other.epsilon if own.norm == other.norm else None
    changed = {name: values[name] for name in run.lengths if name not in given and values[name] is not None}
    return with_values(run, {name: ratio and value * ratio for name, value in changed.items()})


def varied(run: AnyRun, settings: Mapping[str, Any], given: Container[str] = ()) -> AnyRun:
    """``run`` with settings by their dotted names, its lengths beside them in proportion to its radius.

    Those that are ``given`` stay. Raises ConfigError.
    """
    return with_lengths_of(with_values(run, settings), run, {*settings, *(n for n in run.lengths if n in given)})


def as_by_itself(section: AnySection, usual: AnySection, *names: str) -> AnySection:
    """``section`` with those settings as ``usual`` has them, which nothing reads."""
    changed: Any = {name: getattr(usual, name) for name in names}
    return replace(section, **changed)  # type: ignore[type-var]


def check_schedules(run: RunConfig) -> None:
    """Raise ConfigError where a warm-up of a run that is to be trained takes its whole stage."""
    for name, optimizer, epochs in _optimizers(run.canonical):  # in which what nothing reads is as it is by itself
        require(
            optimizer.warmup_epochs < epochs or not epochs or optimizer.schedule == "constant",
            f"{name}.warmup_epochs must be less than the {epochs} epochs of its stage, or the rate never falls, got"
            f" {optimizer.warmup_epochs:g}",
        )


def _optimizers(config: Any, prefix: str = "") -> Iterator[tuple[str, OptimizerConfig, int]]:
    """All optimizers of a run, each with its dotted name and the epochs that stand beside it, 0 where none do.

    ``last_optimizer`` has ``last_epochs``, or where the section has no such setting ``epochs``.
    """
    for name in (each.name for each in fields(config)):
        value = getattr(config, name)
        if isinstance(value, OptimizerConfig):
            beside = (getattr(config, each, None) for each in (name.replace("optimizer", "epochs"), "epochs"))
            yield f"{prefix}{name}", value, next((found for found in beside if isinstance(found, int)), 0)
        elif is_dataclass(value):
            yield from _optimizers(value, f"{prefix}{name}.")


def _with_optimizers(section: Any) -> Any:
    """``section`` with its optimizers in one form; what is no section as it is."""
    if not is_dataclass(section) or isinstance(section, type):
        return section
    values = {each.name: getattr(section, each.name) for each in fields(section)}
    made = {name: value.canonical for name, value in values.items() if isinstance(value, OptimizerConfig)}
    return replace(section, **made)


LATER_FIELDS: dict[str, Any] = {
    "data.label_column": None,
    "data.image_column": None,
    "data.classes": 10,
    "attack.norm": "linf",
    "attack.training_step_size": None,
    "attack.crafting": "pgd",
    "attack.pipeline_steps": 1,
    "attack.pipeline_every": 1,
    "training.select_steps": None,
    "training.fused": "auto",
    "target.ema": None,
    "target.awp": None,
    "target.mean": None,
    "target.std": None,
    "target.entry": None,
    "target.optimizer.gamma": 0.1,
}
"""Settings younger than stored stages, or than their part in keys, by dotted name, each with the value that an absent
one has in their keys: those of the sections that all defenses share."""


SAME_NUMBERS = ("training.draws_ahead", "training.capture")
"""Settings, by dotted name, that decide how a number is computed and not which: keys do not hold them."""


def as_hashed(settings: Mapping[str, Any], later: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as keys hash them: without those of SAME_NUMBERS.

    A setting that is ``later``, by dotted name, is absent while it has the value given there.
    """
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        dotted = f"{prefix}{name}"
        if dotted in SAME_NUMBERS or (dotted in later and value == later[dotted]):
            continue
        kept[name] = as_hashed(value, later, f"{dotted}.") if isinstance(value, Mapping) else value
    return kept
