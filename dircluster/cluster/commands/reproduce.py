"""One call behind jobs/reproduce.py: plan, train and judge what tables of the paper need, and show it beside theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dircluster import cli, torchrun
from dircluster.config import ConfigError, StoppedError, flatten, named_line, to_dict, with_values
from dircluster.reproduction.exhibits import LABELS, Exhibit
from dircluster.reproduction.tables import NAMES, exhibits

if TYPE_CHECKING:
    from dircluster.cluster.reproducing.reproduction import Asked

FAMILIES = {"digits": "cifar10", "cifar10": "cifar10", "cifar10_small": "cifar10", "svhn": "svhn"}
"""What the systems of Table 1 have presets for, and the data set whose printed numbers stand beside."""
DECIDED = ("name", "target.objective", "target.uri", "evaluation.suite")
"""Settings that the tables decide."""


def main(argv: list[str]) -> int:
    """Reproduce what the first word of ``argv`` names; -> exit code. Errors are one line on stderr."""
    words = list(argv)
    what = ["--what", words.pop(0)] if words and not words[0].startswith("-") else []
    flag = cli.value_of("--what", words)

    def settled_once(job: cli.ReproduceJob) -> cli.ReproduceJob:
        if what and flag not in ("", job.what):
            raise ConfigError(f"the first word says {job.what}, and --what {flag}: give one of them")
        return settled(job)

    return cli.execute(cli.ReproduceJob, [*words, *what], _reproduce, settled_once)


def settled(job: cli.ReproduceJob) -> cli.ReproduceJob:
    """``job`` with the suite that what is reproduced is judged by; of all, the longest. Raises ConfigError."""
    chosen = _chosen(job, _only(job))
    for name in DECIDED:
        if name in job.given:
            raise ConfigError(f"--{name} is decided by what is reproduced: leave it out")
    suite = "paper" if any(exhibit.suite == "paper" for exhibit in chosen) else "quick"
    return replace(job, run=with_values(job.run, {"evaluation.suite": suite}))


def _reproduce(job: cli.ReproduceJob) -> int:
    torchrun.check_alone("a reproduction is one process, and --scaling.workers of --launcher ray share its trainings")

    from dircluster.cluster import preflight, storage
    from dircluster.cluster.paths import with_absolute_paths
    from dircluster.cluster.reproducing.reproduction import Reproduction
    from dircluster.cluster.reproducing.units import Listening

    asked = asked_of(job)
    config = with_absolute_paths(asked.job.run)
    storage.to_environment(config.storage)
    preflight.check(config, on_ray=job.launcher == "ray", download=not job.dry_run)
    with Listening() as terminal:
        made = Reproduction(asked, terminal)
        if not job.dry_run:
            storage.check(config)
        try:
            code = made.run()
        except storage.troubles() as error:
            raise StoppedError.of("reproduction", named_line(error)) from error
    for name, reason in made.failed.items():
        cli.say_error(f"{name} failed: {reason}")
    return code


def asked_of(job: cli.ReproduceJob) -> Asked:
    """What a job asks for. Raises ConfigError."""
    from dircluster.cluster.reproducing.reproduction import Asked

    job, only = cli.with_fewest_workers(job), _only(job)
    return Asked(job, tuple(_chosen(job, only)), only, _given(job))


def _only(job: cli.ReproduceJob) -> tuple[str, ...]:
    """The systems of --only; none where it is not given. Raises ConfigError where it names none."""
    found = tuple(word.strip() for word in job.only.split(",") if word.strip())
    if job.only and not found:
        raise ConfigError(f"--only {job.only} names no system: give some, or leave it out")
    return found


def _given(job: cli.ReproduceJob) -> dict[str, Any]:
    """The settings of all systems: what differs from the preset, and what was given that equals it, as presets of
    other systems may differ from it. Lengths that follow from the radius follow from it in each system.
    """
    differs, given = {*cli.describe(job)} - {*job.run.lengths}, {name.replace(".no-", ".") for name in job.given}
    own = (*DECIDED, "seed")
    return {
        name: value
        for name, value in flatten(to_dict(job.run)).items()
        if name not in own and (name in differs or name.replace("_", "-") in given)
    }


def _chosen(job: cli.ReproduceJob, only: tuple[str, ...]) -> list[Exhibit]:
    """What is to be reproduced. Raises ConfigError where there is no such table, preset or system."""
    if job.what not in (*NAMES, "all"):
        missing = f"there is no table or figure {job.what!r}" if job.what else "say first what to reproduce"
        raise ConfigError(f"{missing}; there are {', '.join(NAMES)}, all")
    family = job.preset.removesuffix("_smoke")
    if family not in FAMILIES:
        raise ConfigError(f"not all systems have a preset like {job.preset}: give {', '.join(FAMILIES)}, or NAME_smoke")
    for name in only:
        if name not in LABELS:
            raise ConfigError(f"--only {name} is no system; there are {', '.join(LABELS)}")
    there = exhibits(FAMILIES[family])
    if job.what != "all":
        return [there[job.what]]
    return [each for each in there.values() if not only or any(line.system.name in only for line in each.lines)]
