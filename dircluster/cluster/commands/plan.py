"""What a job would do and take, for --dry-run: sizes, operations, time, memory, bytes, and where everything goes."""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dircluster import cli, torchrun
from dircluster.cluster import preflight, storage
from dircluster.cluster.foretold import Foretold, keep
from dircluster.cluster.loading import load_data
from dircluster.cluster.paths import with_absolute_paths, with_reachable_target
from dircluster.cluster.runtime.local import has_mlflow
from dircluster.cluster.storage import opener
from dircluster.cluster.tracking import place
from dircluster.config import ConfigError, RunConfig
from dircluster.cores import cores
from dircluster.data.layout import split_sizes
from dircluster.defenses.table import find_defense
from dircluster.distributed.launch import local_workers, on_local_workers
from dircluster.distributed.parallel import Parallel
from dircluster.models.precision import is_half
from dircluster.training.costs import count, exchanged, step_operations
from dircluster.training.export import given_target
from dircluster.training.forecast import (
    Calibration,
    Forecast,
    as_launched,
    calibrate,
    forecast,
    from_plain,
    from_summary,
    to_plain,
)
from dircluster.training.stages import trained_stages


def plan(job: cli.TrainJob) -> str:
    """The plan as plain text; what is foretold is kept for the run's summary, and written where --summary says.

    Raises ConfigError where the data, the target or the calibration cannot be used.
    """
    config = as_launched(job.run, job.launcher)
    notes = _check_inputs(job)
    defense = find_defense(config.defense)
    sizes, costs = split_sizes(config.data, opener(config.storage)), count(config)
    images = sizes[0]
    steps = images // config.training.batch_size
    if steps == 0:
        raise ConfigError(f"training.batch_size {config.training.batch_size} is more than the {images} training images")
    data, tracking = config.data, config.tracking
    lines = [
        f"run       {config.name}, seed {config.seed}, launcher {job.launcher}, {config.scaling.workers} worker(s)",
        f"data      {data.uri or data.name}: {images:,} training images of {data.channels}x{data.height}x{data.width}",
        *notes,
        *(f"{word:9} {text}" for word, text in defense.facts(config)),
        f"purifier  {costs.purifier_parameters:,} parameters, {costs.purifier_forward / 1e9:.3f} GFLOP an image",
        f"target    {costs.target_parameters:,} parameters, {costs.target_forward / 1e9:.3f} GFLOP an image",
    ]
    for stage in trained_stages(config):
        one = step_operations(config, stage.name)
        lines.append(
            f"{stage.name:9} {stage.epochs} epochs of {steps} steps, {one / 1e9:,.1f} GFLOP a step,"
            f" {one * steps * stage.epochs / 1e12:,.1f} TFLOP in all"
        )
        lines += [f"{stage.name:9} {note}" for note in stage.notes]
    workers = config.scaling.most
    if workers > 1:
        last = [stage for stage in trained_stages(config) if stage.epochs][-1:]
        on_gpu = config.scaling.device == "gpu" or (config.scaling.device == "auto" and torch.cuda.device_count() > 0)
        half = is_half(config.training.precision, torch.device("cuda" if on_gpu else "cpu"))
        lines += [
            f"exchange  {exchanged(config, stage, workers, half) / 2**20:,.1f} MiB sent and received by each of"
            f" {workers} workers in a step of {stage.name} ({config.parallel.strategy})"
            for stage in last
        ]
    lines += [
        f"evaluate  suite {config.evaluation.suite} on {config.evaluation.images or 'all'} test images",
        f"storage   {config.storage.uri}",
        f"MLflow    {(place.named(config) or f'sqlite in {config.storage.uri}') if tracking.enabled else 'no record'}",
    ]
    found = _measured(job, config) if job.calibration is None else from_summary(job.calibration)
    made = forecast(config, found, *sizes)
    timed = 1 if job.calibration else _together(job, config)
    by = f", {timed} workers together" if timed > 1 else ""
    lines += [
        "",
        f"foretold from {found.device}{by}; start and end of the job, storage and exchange come on top",
        *_table(made),
    ]
    rows = [asdict(one) for one in made]
    if torchrun.is_first():
        keep(Foretold(found.device, rows), with_absolute_paths(job.run), job.launcher)
        cli.write_summary(job, {"calibration": to_plain(found), "foretold": rows})
    return "\n".join(lines)


def _check_inputs(job: cli.TrainJob) -> list[str]:
    """Read data and target as the run will: what is only downloaded then is left out; -> what there is to note.

    Raises ConfigError.
    """
    config = with_absolute_paths(job.run)
    storage.to_environment(config.storage)
    preflight.check(config, on_ray=job.launcher == "ray", download=False)
    notes = []
    if config.data.uri is not None:
        read = load_data(config)
        notes += [f"data      {note}" for note in read.notes]
    config = with_reachable_target(config)
    if config.target.uri is not None:
        notes += [f"target    {note}" for note in given_target(config, opener(config.storage)).notes]
    return notes


def foretold_by(calibration: Path, job: cli.TrainJob) -> Foretold:
    """What --calibration foretells of the job. Raises ConfigError where it cannot."""
    found, sizes = from_summary(calibration), split_sizes(job.run.data, opener(job.run.storage))
    made = forecast(as_launched(job.run, job.launcher), found, *sizes)
    return Foretold(found.device, [asdict(one) for one in made])


def _measured(job: cli.TrainJob, config: RunConfig) -> Calibration:
    """Timed by as many workers as will share a step on this machine, together."""
    if job.launcher == "ray" and _together(job, config) > 1:
        return from_plain(on_local_workers(config.scaling, _calibrate, config, job.launcher))
    with local_workers(config.scaling) as parallel:
        return from_plain(_calibrate(parallel, config, job.launcher))


def _together(job: cli.TrainJob, config: RunConfig) -> int:
    """torchrun's workers, or those that Ray will start here, where that is known and each has a device; else 1."""
    scaling, gpus = config.scaling, torch.cuda.device_count()
    if job.launcher == "local":
        return scaling.most
    devices = cores() if scaling.device == "cpu" or not gpus else gpus
    return scaling.most if not os.environ.get("RAY_ADDRESS") and scaling.most <= devices else 1


def _calibrate(parallel: Parallel, config: RunConfig, launcher: str) -> dict[str, Any]:
    """In a process that has loaded what a worker of the run has: its memory counts."""
    if launcher == "ray":
        importlib.import_module("dircluster.cluster.runtime.ray_train")
    if config.tracking.enabled and parallel.first and (launcher == "ray" or has_mlflow()):
        importlib.import_module("dircluster.cluster.tracking.tracker")
        if (place.named(config) or "sqlite").startswith("sqlite"):
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    return to_plain(calibrate(config, parallel))


def _table(made: list[Forecast]) -> list[str]:
    lines = [
        f"{one.name:10} {timedelta(seconds=round(one.seconds))!s:>10}, {one.memory / 2**30:6.2f} GiB at the peak,"
        f" {one.stored / 2**20:8.1f} MiB stored"
        for one in made
    ]
    total = sum(one.seconds for one in made)
    return [*lines, f"in all     {timedelta(seconds=round(total))!s:>10}"]
