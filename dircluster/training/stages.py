"""What the stages of a run depend on, the networks that they train, and the batches that they train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dircluster.config import LATER_FIELDS, ConfigError, RunConfig, as_hashed, digest
from dircluster.data.loader import Loader
from dircluster.data.split import Split
from dircluster.data.stream import Shards, StreamLoader
from dircluster.defenses.base import Purifier
from dircluster.defenses.stage import Defense, Stage
from dircluster.defenses.table import find_defense
from dircluster.distributed.parallel import Parallel
from dircluster.models.precision import channels_last
from dircluster.training.compiling import compile_blocks
from dircluster.training.stage_folder import StageFolder, find_stage_folder

CRAFTING = ("crafting", "pipeline_steps", "pipeline_every")
"""Settings of ``attack`` that say how samples are crafted on a whole pipeline."""
DATA = ("held_out", "crop_padding", "flip", "resize", "stream", "classes")
"""Settings of ``data`` that decide weights beside the images, whose fingerprint is in the key."""
FORMAT = 2
"""Raised when the same config would give other numbers than before: older stages are then not reused."""


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run in order; the last one's result is the defense."""
    return find_defense(config.defense).stages(config)


def trained_stages(config: RunConfig) -> list[Stage]:
    """Those that the run trains: all but a target that is given."""
    return [stage for stage in stages_of(config) if stage.name != "target" or config.target.uri is None]


def find_stage(config: RunConfig, name: str) -> Stage:
    """The stage of that name. Raises ConfigError where the run has none."""
    found = {stage.name: stage for stage in stages_of(config)}
    if name not in found:
        raise ConfigError(f"the run has no stage {name!r}; it has {', '.join(found)}")
    return found[name]


def stage_settings(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """The settings that decide a stage's weights, as nested plain data in one form."""
    plain = config.decisive
    settings = {section: plain[section] for section in (*stage.sections, "attack", "training")}
    for name in ("uri", "entry"):
        settings.get("target", {}).pop(name, None)
    if not stage.on_pipeline:  # stages that craft alike are one, whatever is trained over them
        settings["attack"] |= {name: LATER_FIELDS[f"attack.{name}"] for name in CRAFTING}
    settings["data"] = {field: plain["data"][field] for field in DATA}
    revision = {"revision": stage.revision} if stage.revision > 1 else {}
    return {"seed": config.seed, **revision, **settings}


def stage_key(config: RunConfig, stage: Stage, inputs: Mapping[str, str | None]) -> str:
    """SHA-256 of everything that decides a stage's weights: settings, data fingerprint, earlier stages' digests."""
    settings = as_hashed(stage_settings(config, stage), {**LATER_FIELDS, **config.later})
    return digest({"format": FORMAT, "stage": stage.name, "inputs": dict(inputs), **settings})


def loader_of(stage: Stage, train: Split | Shards, config: RunConfig, parallel: Parallel) -> Loader | StreamLoader:
    """This worker's batches of a stage from the training split, augmented as the stage says."""
    data = config.data if stage.augments else replace(config.data, crop_padding=0, flip=False)
    share: dict[str, Any] = {"rank": parallel.rank, "world": parallel.world, "device": parallel.device}
    if isinstance(train, Shards):
        return StreamLoader(replace(train, config=data), config.training.batch_size, config.seed, stage.name, **share)
    share |= {"crop_padding": data.crop_padding, "flip": data.flip}
    return Loader(train, config.training.batch_size, config.seed, stage.name, **share)


def finished_stages(config: RunConfig, fingerprint: str, storage: Path) -> Iterator[StageFolder]:
    """The stages of a run that ``storage`` holds finished, in their order, up to the first that it does not.

    ``fingerprint`` is that of the run's data. The target must not be given: its key would be that of its weights.
    """
    inputs: dict[str, str | None] = {"data": fingerprint}
    for stage in stages_of(config):
        found = find_stage_folder(storage, stage.name, stage_key(config, stage, inputs))
        if found.digest is None:
            return
        inputs[stage.name] = found.digest
        yield found


class Networks(Mapping[str, nn.Module]):
    """A run's networks by name, on the worker's device, in the memory layout and form that it runs them best in."""

    def __init__(self, config: RunConfig, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.defense: Defense = find_defense(config.defense)
        self._made: dict[str, nn.Module] = {}
        self.renew(("classifier", *self.defense.modules(config)))

    def __getitem__(self, name: str) -> nn.Module:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def renew(self, names: Iterable[str]) -> None:
        """Make the networks of those names again, with initial weights."""
        config, parallel = self.config, self.parallel
        for name in names:
            made = self.defense.build(config, name).to(parallel.device)
            if isinstance(made, Purifier):
                made.recompute = config.parallel.activation_checkpointing
            if name == "classifier" and channels_last(config.training.precision, parallel.device):
                made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            parallel.synchronize_statistics(made)
            if config.training.compiles:
                compile_blocks(made)
            self._made[name] = made
