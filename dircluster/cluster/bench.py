"""The bench on which a defense is judged: built alike on every worker, from plain data."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dircluster.cluster.storage import check_bucket, is_remote, open_path, opener
from dircluster.config import ConfigError, DataConfig, RunConfig, digest, from_dict
from dircluster.data.sources import Split, load
from dircluster.evaluation.benchmark import Plan, plan
from dircluster.evaluation.judgement import Folder, Judgement
from dircluster.evaluation.provenance import facts_of, results_folder
from dircluster.evaluation.subject import Subject
from dircluster.models.defended import DefendedClassifier
from dircluster.training import checkpoint
from dircluster.training.bundle import load_defense_folder, load_target
from dircluster.training.pipeline import data_cache

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Brief:
    """What is to be judged on what, as plain data that can be sent to a worker."""

    config: dict[str, Any]
    """A RunConfig."""
    defense: str
    """none, package.module:factory, or the folder of a checkpoint, here or in object storage."""
    path: str
    """Folder that package.module is looked for in, before the installed ones."""
    surrogate: str = ""
    """A classifier's URI to craft transfers on, empty for the defense's own target."""
    trust_code: bool = False
    keep_images: bool = False
    key: str = ""
    """What the first process found: workers that find something else do not begin."""


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


def load_module(brief: Brief, config: RunConfig) -> nn.Module:
    """The module that ``brief`` names, in eval mode on the CPU."""
    data, storage = config.data, config.storage
    if brief.defense == "none":
        if config.target.uri is None:
            raise ConfigError("--defense none judges the bare target: say which with --target.uri")
        return load_classifier(config.target.uri, config)
    if FACTORY.fullmatch(brief.defense):
        return _made(brief).eval()
    if is_remote(brief.defense):
        check_bucket(brief.defense, storage)
    defense = load_defense_folder(open_path(brief.defense, storage), trust_code=brief.trust_code)
    denoiser = defense.denoiser
    found = (denoiser.channels, denoiser.height, denoiser.width)
    if found != (data.channels, data.height, data.width):
        raise ConfigError(
            f"--defense takes {'x'.join(map(str, found))} images, but preset {config.name} has"
            f" {data.channels}x{data.height}x{data.width}; name the preset it was trained with"
        )
    return defense


def committed(brief: Brief, config: RunConfig) -> str | None:
    """Digest of the committed folder that holds the defense, as the run that made it knows it; None where none does."""
    if brief.defense == "none" or FACTORY.fullmatch(brief.defense):
        return None
    return checkpoint.digest(open_path(brief.defense, config.storage))


def load_classifier(uri: str, config: RunConfig) -> nn.Module:
    """The classifier that ``uri`` names as ``target.uri`` would, in eval mode on the CPU."""
    target = dataclasses.replace(config.target, uri=uri)
    return load_target(dataclasses.replace(config, target=target), opener(config.storage)).eval()


def _made(brief: Brief) -> nn.Module:
    name, _, attribute = brief.defense.partition(":")
    if brief.path not in sys.path:
        sys.path.insert(0, brief.path)
    try:
        made = getattr(importlib.import_module(name), attribute)()
    except Exception as error:  # somebody's code may raise anything
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--defense {brief.defense}: {type(error).__name__}: {line}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"--defense {brief.defense} must return a torch.nn.Module, got {type(made).__name__}")
    return made


def fingerprint(module: nn.Module, name: str) -> str:
    """SHA-256 of a module's weights and, where it is somebody's own, of the package that makes it, unless installed."""
    found = hashlib.sha256(repr(module).encode())
    for key, value in sorted(module.state_dict().items()):
        found.update(key.encode())
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().flatten()
            found.update(str(value.dtype).encode() + plain.view(torch.uint8).numpy().tobytes())
    if isinstance(module, DefendedClassifier):
        found.update(repr(module.masking).encode())
    if FACTORY.fullmatch(name):
        package = name.partition(":")[0].partition(".")[0]
        for key, part in sorted(sys.modules.items()):
            file = Path(getattr(part, "__file__", None) or "")
            if key.partition(".")[0] == package and file.is_file() and "site-packages" not in file.parts:
                found.update(file.read_bytes())
    return found.hexdigest()


def with_suite(config: RunConfig, suite: str | None, verdict: bool) -> RunConfig:
    """``config`` with the suite and the verdict that the command line asks for."""
    settings = config.evaluation if suite is None else dataclasses.replace(config.evaluation, suite=suite)  # type: ignore[arg-type]
    return dataclasses.replace(config, evaluation=dataclasses.replace(settings, verdict=verdict))
