"""One call behind jobs/benchmark.py: time a step on real images and print where it goes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dircluster import cli, torchrun
from dircluster.config import ConfigError
from dircluster.printing import say

if TYPE_CHECKING:
    from dircluster.data.split import Split
    from dircluster.defenses.table import Variants
    from dircluster.distributed.parallel import Parallel


def main(argv: list[str]) -> int:
    """Print the measurements of the preset that ``argv`` names; -> exit code. Errors are one line on stderr."""
    return cli.execute(cli.BenchmarkJob, argv, _benchmark)


def _benchmark(job: cli.BenchmarkJob) -> int:
    scaling = job.run.scaling
    if scaling.least > 1 and not torchrun.is_member():
        raise ConfigError(f"a benchmark is one worker: start scaling.workers {scaling.workers} by torchrun")
    measured = _measure(job)
    if torchrun.is_first():
        say(_comparison(measured) if job.compare else _lines(measured))
        cli.write_summary(job, measured)
    return 0


def _measure(job: cli.BenchmarkJob) -> dict[str, Any]:
    from dircluster.cluster.loading import load_data
    from dircluster.cluster.paths import fetched
    from dircluster.cluster.storage import opener
    from dircluster.data.split import Split
    from dircluster.defenses.table import variants_of
    from dircluster.distributed.launch import local_workers
    from dircluster.training import stages
    from dircluster.training.export import load_target
    from dircluster.training.profiling import time_eot, time_phases

    config = job.run
    if config.data.stream:
        raise ConfigError("data.stream has no use in a benchmark of a step: it reads its images beforehand")
    variants = variants_of(config) if job.compare else {}
    if job.compare and not variants:
        raise ConfigError(f"--compare has nothing to compare the step of {config.defense} with")
    needed = (1 + job.steps) * config.training.batch_size
    short = dataclasses.replace(config.data, limit=config.data.limit or max(10, 2 * needed))
    with local_workers(config.scaling) as parallel:
        train = load_data(dataclasses.replace(config, data=short)).train
        assert isinstance(train, Split)
        if job.compare:
            return _compare(job, variants, train, parallel)
        networks = stages.Networks(config, parallel)
        if config.target.uri:
            target = dataclasses.replace(config.target, uri=fetched(config.target.uri, config))
            given = load_target(dataclasses.replace(config, target=target), opener(config.storage))
            networks["classifier"].load_state_dict(given.state_dict())
        stage = stages.stages_of(config)[-1]
        measured = time_phases(stage, stage.recipe(networks), train, config, parallel, job.steps)
        defense = networks.defense.defended(config, networks).eval()
        few = slice(min(8, len(train)))
        images, labels = train.pixels(few).to(parallel.device), train.labels[few].to(parallel.device)
        return measured | {"eot": time_eot(defense, images, labels, 20, config.evaluation.precision)}


def _compare(job: cli.BenchmarkJob, compared: Variants, train: Split, parallel: Parallel) -> dict[str, Any]:
    from dircluster.training import stages
    from dircluster.training.profiling import compare, device_name

    variants = {}
    for name, (run, recipe) in compared.items():
        networks, stage = stages.Networks(run, parallel), stages.stages_of(run)[-1]
        variants[name] = (stage, (recipe or stage.recipe)(networks), run)
    batch = job.run.training.batch_size
    rows = compare(variants, train, parallel, job.steps)
    return {"device": device_name(parallel.device), "batch_size": batch, "rounds": job.steps, "steps": rows}


def _comparison(measured: dict[str, Any]) -> str:
    lines = [f"{measured['device']}, batch {measured['batch_size']}, {measured['rounds']} rounds in turns (medians)"]
    for row in measured["steps"]:
        low, high = row["spread"]
        lines.append(
            f"  {row['step']:8} {row['seconds']:10.4f} s  {row['images_per_second']:9,.1f} images/s"
            f"  {row['times_the_first']:.2f} times the first (quartiles {low:.2f} to {high:.2f}),"
            f" {row['share_of_matrix_product_rate']:.0%} of the matrix-product rate"
        )
    return "\n".join(lines)


def _lines(measured: dict[str, Any]) -> str:
    seconds = measured["seconds"]
    total, eot = measured["seconds_a_step"], measured["eot"]
    lines = [
        f"{measured['device']}, {measured['precision']}, batch {measured['batch_size']}, {measured['steps']} steps"
    ]
    lines += [f"  {phase:8} {value:10.4f} s  {value / total:4.0%}" for phase, value in seconds.items()]
    lines += [
        f"  step     {total:10.4f} s  {measured['images_per_second']:,.1f} images/s",
        f"  work     {measured['gflop_a_step']:,.1f} GFLOP a step, {measured['gflop_per_second']:,.0f} GFLOP/s,"
        f" {measured['share_of_matrix_product_rate']:.0%} of the machine's matrix-product rate"
        f" ({measured['matrix_product_gflop_per_second']:,.0f} GFLOP/s)",
        f"  memory   {measured['peak_memory_mib']:,} MiB at the peak",
        f"  EOT      {eot['draws']} draws of {eot['images']} images: {eot['batched']:.4f} s batched,"
        f" {eot['calls']:.4f} s as {eot['draws']} calls, {eot['calls'] / eot['batched']:.1f} times",
        f"  loss     {measured['first_loss']:.4f} at the first step, {measured['last_loss']:.4f} at the last",
    ]
    return "\n".join(lines)
