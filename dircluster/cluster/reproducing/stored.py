"""Which stages of a plan storage holds finished, whoever trained them."""

from __future__ import annotations

from dircluster.cluster.paths import with_absolute_paths
from dircluster.cluster.storage import open_path, opener
from dircluster.config import RunConfig
from dircluster.data.layout import data_cache
from dircluster.data.sources import load
from dircluster.reproduction.plan import Plan
from dircluster.training.stages import finished_stages


def stored_stages(plan: Plan, config: RunConfig) -> set[str]:
    """The keys, as trainings of the plan have them, of finished stages in ``config``'s storage.

    Data is read, for its fingerprint, where a stage of any run is there at all. Raises ConfigError where it cannot be.
    """
    storage = open_path(config.storage.uri, config.storage)
    if not any(storage.glob("*/final")):
        return set()
    fingerprint = load(config.data, config.seed, data_cache(config.storage), opener(config.storage)).fingerprint
    return {
        training.stages[stage.name]
        for training in plan.trainings.values()
        for stage in finished_stages(with_absolute_paths(training.run), fingerprint, storage)
    }
