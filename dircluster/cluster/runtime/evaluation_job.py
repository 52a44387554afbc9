"""A defense, its images and their evaluation: made alike on every worker, from plain data."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dircluster.cluster.loading import FACTORY, Brief, fingerprint, load_classifier, load_module
from dircluster.cluster.storage import open_path, opener
from dircluster.config import ConfigError, DataConfig, RunConfig, digest, from_dict
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.defenses.base import DefendedClassifier
from dircluster.evaluation.evaluation import Judgement
from dircluster.evaluation.provenance import facts_of, results_folder
from dircluster.evaluation.session import Plan, plan
from dircluster.evaluation.store import Folder
from dircluster.evaluation.victim import Subject
from dircluster.training import checkpoint
from dircluster.training.run import data_cache


class Bench:
    """A worker's defense, images and judgement. Raises ConfigError where they cannot be had or do not fit."""

    def __init__(self, brief: Brief, device: torch.device) -> None:
        self.config: RunConfig = from_dict(RunConfig, brief.config)
        self.device, self.settings = device, self.config.evaluation
        module = load_module(brief, self.config).to(device)
        data = load(with_photos(self.config), self.config.seed, data_cache(self.config), opener(self.config.storage))
        self.test: Split = data.test.take(slice(self.settings.images))
        self.name = {"none": "none"}.get(
            brief.defense, "dir" if isinstance(module, DefendedClassifier) else brief.defense
        )
        surrogate = load_classifier(brief.surrogate, self.config).to(device) if brief.surrogate else None
        self.subject = Subject(module, self.name, surrogate)
        images, _ = self.batch(0, min(8, len(self.test)))
        self.subject.meet(images, int(self.test.labels.max()), self.config.data.classes)
        self.facts = facts_of(
            committed(brief, self.config) or fingerprint(module, brief.defense),
            data.fingerprint,
            len(self.test),
            self.config.seed,
            self.settings,
            None if surrogate is None else fingerprint(surrogate, ""),
        )
        self.key = digest(self.facts)
        if brief.key not in ("", self.key):
            raise ConfigError(
                f"--defense {brief.defense} is not the same on every worker: seed its weights, and install one version"
            )
        storage = open_path(self.config.storage.uri, self.config.storage)
        self.folder = results_folder(storage, self.name, self.facts)
        self.plan: Plan = plan(self.subject, self.config.attack, self.settings)
        self.judgement = Judgement(
            self.plan.cases,
            len(self.test),
            self.config.seed,
            self.settings.batch_size,
            self.settings.rows,
            Folder(self.folder, brief.keep_images),
            self.subject,
        )

    @cached_property
    def units(self) -> list[Any]:
        """All units, in order."""
        return list(self.judgement.units())

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels of rows, on the worker's device."""
        rows = slice(start, stop)
        return self.test.pixels(rows).to(self.device), self.test.labels[rows].to(self.device)

    def work(self, place: int) -> None:
        """Do the unit at ``place``, unless it is done."""
        unit = self.units[place]
        if self.judgement.outcome(unit) is None:
            self.judgement.work(unit, *self.batch(*unit.rows))


def with_photos(config: RunConfig) -> DataConfig:
    """``config.data``; where it names the photos that a run writes into storage, the place where they lie."""
    data = config.data
    if data.name != "photos" or data.uri is not None:
        return data
    folder = open_path(config.storage.uri, config.storage) / "data" / "photos"
    return dataclasses.replace(data, uri=str(folder))


def committed(brief: Brief, config: RunConfig) -> str | None:
    """Digest of the committed folder that holds the defense, as the run that made it knows it; None where none does."""
    if brief.defense == "none" or FACTORY.fullmatch(brief.defense):
        return None
    return checkpoint.digest(open_path(brief.defense, config.storage))


def with_suite(config: RunConfig, suite: str | None, verdict: bool) -> RunConfig:
    """``config`` with the suite and the verdict that the command line asks for."""
    settings = config.evaluation if suite is None else dataclasses.replace(config.evaluation, suite=suite)  # type: ignore[arg-type]
    return dataclasses.replace(config, evaluation=dataclasses.replace(settings, verdict=verdict))
