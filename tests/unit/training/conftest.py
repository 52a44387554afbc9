"""Runs and trainers as tests of several files make them, and consoles that stop them or keep what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from dircluster.config import RunConfig
from dircluster.data.loader import Loader
from dircluster.data.sources import load
from dircluster.training import stages
from dircluster.training.capture import Recorder
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.protocols import NoRecord, NoTracker, Quiet, Status
from dircluster.training.run import Run
from dircluster.training.trainer import Trainer
from tests.conftest import ALONE


class StopAfter(Quiet):
    """Asks to stop after so many progress reports."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    def show(self, status: Status) -> None:
        self.left -= 1

    def stop_signal(self) -> int:
        return 15 if self.left <= 0 else 0


class Hears(Quiet):
    """Keeps the lines that are said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def batch_normed(classes: int, channels: int) -> nn.Module:
    """The least network with running statistics, for what is trained jointly."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head)


BATCH_NORMED = f"{__name__}:batch_normed"


def run(config: RunConfig, console: Any = None, fresh: str = "", until: str = "") -> dict[str, Any]:
    """A run of one worker, whole or ``until`` a stage: -> its outcome."""
    return Run(config, ALONE, NoTracker(), console or Quiet(), owner=fresh, fresh=bool(fresh), until=until).execute()


def elsewhere(config: RunConfig, folder: Path) -> RunConfig:
    """The same run, stored in ``folder``."""
    return dataclasses.replace(config, storage=dataclasses.replace(config.storage, uri=str(folder)))


def weights(outcome: dict[str, Any]) -> dict[str, bytes]:
    """The files of weights that a run ended in."""
    return {f.name: f.read_bytes() for f in Path(outcome["checkpoint"]).glob("*.safetensors")}


def make_trainer(
    config: RunConfig, folder: Path, recorder: Recorder | None = None, stage: str = "dir", console: Quiet | None = None
) -> Trainer:
    """The trainer of a stage of a run, whose checkpoints lie in ``folder``."""
    data, planned = load(config.data, config.seed), stages.find_stage(config, stage)
    recipe = planned.recipe(stages.Networks(config, ALONE))
    loader = Loader(data.train, config.training.batch_size, config.seed, stage)  # type: ignore[arg-type]
    kept, said = Checkpoints(folder, "k"), console or Quiet()
    return Trainer(planned, recipe, loader, data.held_out, config, ALONE, kept, NoRecord(), said, recorder)
