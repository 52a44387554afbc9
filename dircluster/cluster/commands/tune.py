"""One call behind jobs/tune*.py: train at every point of a space, and say what that showed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dircluster import cli
from dircluster.cluster.sweeps.space import Settings, Space, corners, fitted, load_space, mapped
from dircluster.config import ConfigError, RunConfig, flatten, to_dict, varied


def main(argv: Sequence[str], space: Path | None = None) -> int:
    """Run the sweep that ``argv`` describes, over the file ``space`` where the job has one of its own; -> exit code."""

    def settled(job: cli.TuneJob) -> cli.TuneJob:
        if space is not None and job.space is not None:
            raise ConfigError(f"--space is {space.name} here, got {job.space}: leave it out, or use jobs/tune.py")
        return job if space is None else replace(job, space=Path(os.path.relpath(space)))

    return cli.execute(cli.TuneJob, argv, _tune, settled)


def _tune(job: cli.TuneJob) -> int:
    if job.space is None:
        raise ConfigError("--space is missing: give a file such as tune_spaces/alpha.py")
    if job.asha and job.seeds > 1:
        raise ConfigError("--asha compares trials of one seed each: leave out --seeds, or --asha")
    if "points" in job.given and not job.search:
        raise ConfigError("--points says how many points a search chooses: add --search, or leave it out")
    space, job = load_space(job.space), cli.with_fewest_workers(job)
    space = fitted(space, job.run, job.search)
    if job.search or job.asha:
        _check_chosen_by(space, job)

    from dircluster.cluster import preflight, storage
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.paths import with_absolute_paths, with_reachable_target

    def reachable(run: RunConfig) -> RunConfig:
        return with_reachable_target(with_absolute_paths(run))

    def held(settings: Settings) -> Settings:
        found = flatten(to_dict(reachable(varied(job.run, settings, job.given_settings))))
        return {name: found[name] for name in settings}

    config = with_absolute_paths(job.run)
    storage.to_environment(config.storage)
    preflight.check(config)
    for settings in corners(space.ranges) or space.points:
        point = varied(job.run, settings, job.given_settings)
        preflight.check(with_absolute_paths(point), download="data.name" in settings)
    storage.check(config)
    with Terminal() as terminal:
        from dircluster.cluster.sweeps.sweep import Sweep  # seconds of imports, in which signals are caught

        return Sweep(job, reachable(job.run), mapped(space, held), terminal).run()


def _check_chosen_by(space: Space, job: cli.TuneJob) -> None:
    """Raise ConfigError where no point is trained with what a search or ASHA chooses by."""
    from dircluster.training.costs import recipe_on_meta
    from dircluster.training.stages import stages_of

    for settings in corners(space.ranges) or space.points:
        run = varied(job.run, settings, job.given_settings)
        try:
            if recipe_on_meta(run, stages_of(run)[-1].name).deployed() is not None:
                return
        except Exception:  # its training says why
            return
    flag, instead = ("--search", "train the points of a GRID") if job.search else ("--asha", "leave it out")
    raise ConfigError(
        f"{flag} chooses by robust accuracy on held-out images, and the last stage of {job.run.defense} has none here:"
        f" {instead}"
    )
