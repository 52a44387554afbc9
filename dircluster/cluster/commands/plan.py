"""What a job would do, for --dry-run: sizes, operations, and where everything goes."""

from __future__ import annotations

from dircluster import cli
from dircluster.cluster.storage import opener
from dircluster.config import ConfigError
from dircluster.data.sources import training_images
from dircluster.defenses.table import find_defense
from dircluster.training.costs import count, step_operations


def plan(job: cli.TrainJob) -> str:
    """The plan as plain text. Raises ConfigError where the data or the target cannot be used."""
    config = job.run
    defense = find_defense(config.defense)
    images, costs = training_images(config.data, opener(config.storage)), count(config)
    steps = images // config.training.batch_size
    if steps == 0:
        raise ConfigError(f"training.batch_size {config.training.batch_size} is more than the {images} training images")
    data, tracking = config.data, config.tracking
    lines = [
        f"run       {config.name}, seed {config.seed}, launcher {job.launcher}, {config.scaling.workers} worker(s)",
        f"data      {data.uri or data.name}: {images:,} training images of {data.channels}x{data.height}x{data.width}",
        *(f"{word:9} {text}" for word, text in defense.facts(config)),
        f"purifier  {costs.purifier_parameters:,} parameters, {costs.purifier_forward / 1e9:.3f} GFLOP an image",
        f"target    {costs.target_parameters:,} parameters, {costs.target_forward / 1e9:.3f} GFLOP an image",
    ]
    planned = defense.stages(config)
    for stage in planned:
        if stage.name == "target" and config.target.uri is not None:
            continue
        one = step_operations(config, stage.name)
        lines.append(
            f"{stage.name:9} {stage.epochs} epochs of {steps} steps, {one / 1e9:,.1f} GFLOP a step,"
            f" {one * steps * stage.epochs / 1e12:,.1f} TFLOP in all"
        )
    workers = config.scaling.most
    if workers > 1:
        lines.append(
            f"exchange  {costs.exchanged(config, planned[-1], workers) / 2**20:,.1f} MiB sent and received by each of"
            f" {workers} workers in a step of {planned[-1].name} ({config.parallel.strategy})"
        )
    lines += [
        f"evaluate  suite {config.evaluation.suite} on {config.evaluation.images or 'all'} test images",
        f"storage   {config.storage.uri}",
        f"MLflow    {(tracking.uri or f'sqlite in {config.storage.uri}') if tracking.enabled else 'no record'}",
    ]
    return "\n".join(lines)
