"""What storage holds of a plan, whoever made it: finished stages, and systems that are judged to the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dircluster.cluster.loading import load_data
from dircluster.cluster.paths import with_absolute_paths
from dircluster.cluster.storage import open_path, opener
from dircluster.config import RunConfig, with_values
from dircluster.data.layout import split_sizes
from dircluster.evaluation.provenance import facts_of
from dircluster.evaluation.sample import row_numbers
from dircluster.evaluation.session import evaluation_of, stores_of
from dircluster.evaluation.session import plan as attacks_on
from dircluster.evaluation.victim import VictimModel
from dircluster.reproduction.plan import Plan, Training, Unit
from dircluster.reproduction.transfer import transfer_folder
from dircluster.training import checkpoint
from dircluster.training.export import load_defense_folder
from dircluster.training.stages import finished_stages


@dataclass(frozen=True)
class Stored:
    """The finished stages of a plan's trainings."""

    stages: Mapping[str, Path] = field(default_factory=dict)
    """Where each lies, by its key as trainings have it."""
    data: str = ""
    """Fingerprint of the data; empty where no stage is there."""


def find_stored(plan: Plan, config: RunConfig) -> Stored:
    """What ``config``'s storage holds finished.

    Data is read, for its fingerprint, where a stage of any run is there at all. Raises ConfigError where it cannot be.
    """
    storage = open_path(config.storage.uri, config.storage)
    if not any(storage.glob("*/final")):
        return Stored()
    fingerprint = load_data(config).fingerprint
    stages = {
        training.stages[stage.name]: stage.final
        for training in plan.trainings.values()
        for stage in finished_stages(with_absolute_paths(training.run), fingerprint, storage)
    }
    return Stored(stages, fingerprint)


def judged_units(plan: Plan, stored: Stored, known: Collection[str] = ()) -> set[str]:
    """Keys of trainings and transfers that have been judged to the last shard, by code that attacks as this does.

    Each that is not ``known`` is loaded for it: its attacks, and the code that they run, follow from the defense.
    """
    found = set(known)
    for unit in plan.all:
        if unit.key in found or (final := _defense_of(unit, plan, stored)) is None:
            continue
        run = with_values(with_absolute_paths(plan.run_of(unit)), {"evaluation.verdict": False})  # as units are judged
        if _is_judged(run, final, stored.data):
            found.add(unit.key)
    return found


def _defense_of(unit: Unit, plan: Plan, stored: Stored) -> Path | None:
    """The folder of a finished defense; None where there is none."""
    if isinstance(unit, Training):
        return stored.stages.get(unit.key)
    purifier, target = stored.stages.get(unit.purifier), stored.stages.get(unit.target)
    if purifier is None or target is None:
        return None
    storage = with_absolute_paths(plan.run_of(unit)).storage
    made = transfer_folder(open_path(storage.uri, storage), purifier, target)
    return None if made.digest is None else made.final


def _is_judged(run: RunConfig, final: Path, data: str) -> bool:
    """Whether storage has the outcome of every shard of the suite on the test images."""
    try:
        defense = load_defense_folder(final, trust_code=True)
    except checkpoint.CheckpointError:  # it will be made again
        return False
    victim, settings = VictimModel(defense, defense.name), run.evaluation
    images = len(row_numbers(split_sizes(run.data, opener(run.storage))[2], settings))
    facts = facts_of(checkpoint.digest(final), data, images, run.seed, settings)
    stores = stores_of(victim, facts, open_path(run.storage.uri, run.storage))
    evaluation = evaluation_of(attacks_on(victim, run.attack, settings), victim, images, run.seed, settings, *stores)
    return all(evaluation.outcome(shard) is not None for shard in evaluation.shards())
