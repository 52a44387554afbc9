"""A defense, its images and their evaluation: made the same way on every worker, from plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dircluster.cluster import version
from dircluster.cluster.loading import FACTORY, JobSpec, fingerprint, load_classifier, load_data, load_module
from dircluster.cluster.storage import open_path
from dircluster.config import ConfigError, RunConfig, digest
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.evaluation.claims import claim_of
from dircluster.evaluation.html_report import robustbench_entry
from dircluster.evaluation.meeting import meet
from dircluster.evaluation.provenance import facts_of
from dircluster.evaluation.sample import class_notes, judged_rows, row_numbers
from dircluster.evaluation.session import EvaluationReport, Plan, evaluation_of, plan, report, stores_of
from dircluster.evaluation.victim import VictimModel
from dircluster.models.precision import channels_last
from dircluster.presets import run_from_plain, run_to_plain
from dircluster.training import checkpoint
from dircluster.training.interrupt import Interrupted, interruptible
from dircluster.training.profiling import answer_costs
from dircluster.training.protocols import Console
from dircluster.zoo import find, is_shipped


class EvaluationJob:
    """A worker's defense, images and evaluation. Raises ConfigError where they cannot be had or do not fit."""

    def __init__(self, job_spec: JobSpec, device: torch.device) -> None:
        self.config: RunConfig = run_from_plain(job_spec.config)
        self.device, self.settings = device, self.config.evaluation
        module = load_module(job_spec, self.config).to(device)
        if isinstance(module, Defended) and channels_last(self.settings.precision, device):
            module.classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        data = load_data(self.config)
        self.classes = data.classes
        self.rows = row_numbers(len(data.test), self.settings)
        self.test: Split = data.test.take(judged_rows(len(data.test), self.settings))
        self.name = module.name if isinstance(module, Defended) else job_spec.defense
        surrogate = load_classifier(job_spec.surrogate, self.config).to(device) if job_spec.surrogate else None
        self.victim = VictimModel(module, self.name, surrogate)
        images, _ = self.batch(0, min(8, len(self.test)))
        meet(self.victim, images, int(self.test.labels.max()), self.config.data.classes)
        self.victim.notes += class_notes(data.test.labels, self.settings)
        self.facts = facts_of(
            committed(job_spec, self.config) or fingerprint(module, job_spec.defense),
            data.fingerprint,
            len(self.test),
            self.config.seed,
            self.settings,
            None if surrogate is None else fingerprint(surrogate, ""),
        )
        self.key = digest(self.facts)
        if job_spec.key not in ("", self.key):
            raise ConfigError(
                f"--defense {job_spec.defense} is not the same on every worker: seed its weights, and"
                " install one version"
            )
        storage = open_path(self.config.storage.uri, self.config.storage)
        stores = stores_of(self.victim, self.facts, storage, job_spec.keep_images)
        self.folder = stores[0].folder
        self.plan: Plan = plan(self.victim, self.config.attack, self.settings)
        count, seed = len(self.test), self.config.seed
        self.evaluation = evaluation_of(self.plan, self.victim, count, seed, self.settings, *stores)

    @cached_property
    def shards(self) -> list[Any]:
        """All shards, in order."""
        return list(self.evaluation.shards())

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels of rows, on the worker's device."""
        rows = slice(start, stop)
        return self.test.pixels(rows).to(self.device), self.test.labels[rows].to(self.device)

    def work(self, index: int) -> None:
        """Do the shard at ``index``, unless it is done."""
        shard = self.shards[index]
        if self.evaluation.outcome(shard) is None:
            self.evaluation.work(shard, *self.batch(*shard.rows))

    def open_indices(self) -> list[int]:
        """Of the shards that nobody has finished."""
        return [index for index, shard in enumerate(self.shards) if self.evaluation.outcome(shard) is None]

    def work_here(
        self, indices: Iterable[int], console: Console, on_done: Callable[[int], None] = lambda index: None
    ) -> int:
        """Do the shards at ``indices`` in this process; -> the signal that stopped it, or 0.

        ``on_done`` is called with the index of each.
        """
        module = self.victim.module
        try:
            with interruptible(module.classifier if isinstance(module, Defended) else module, console):
                for index in indices:
                    self.work(index)
                    on_done(index)
        except Interrupted as stop:
            return stop.signal
        return 0

    def report(self) -> EvaluationReport:
        """What was found, once all shards are done."""
        return report(self.evaluation, self.plan, self.name, self.settings)

    def report_facts(self, defense: str, surrogate: str = "") -> dict[str, Any]:
        """What decides the rows of a report, for jobs/replay.py. ``defense`` and ``surrogate`` as they were named."""
        return {
            **self.facts,
            "commit": version.commit(),
            "name": self.config.name,
            "digest": self.facts["defense"],
            "defense": defense,
            "surrogate_uri": surrogate,
            "machine": self.evaluation.machine,
            "settings": run_to_plain(self.config),
            "classes": self.classes,
        }

    def claim(self, found: EvaluationReport, facts: dict[str, Any]) -> dict[str, Any]:
        """What a report claims, with what an answer of the defense costs; ``facts`` are those of report_facts."""
        few = max(1, 64 // self.victim.passes)  # of an EBM an image is seconds
        images, _ = self.batch(0, min(few, len(self.test)))
        entry = robustbench_entry(found, self.config, self.victim.passes)
        return claim_of(entry, found, facts, answer_costs(self.victim.module, images))


def committed(job_spec: JobSpec, config: RunConfig) -> str | None:
    """Digest of the committed folder that holds the defense, as the run that made it knows it; None where none does."""
    if is_shipped(job_spec.defense):
        found = find(job_spec.defense)
        return None if found.bare else found.sha256
    if job_spec.defense == "none" or FACTORY.fullmatch(job_spec.defense):
        return None
    return checkpoint.digest(checkpoint.finished(open_path(job_spec.defense, config.storage)))
