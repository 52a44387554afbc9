"""One call behind jobs/replay.py: a row of a report or a claim, computed again."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from dircluster import torchrun
from dircluster.config import ConfigError, StorageConfig, is_own_code, refuse_secret, without_secrets
from dircluster.printing import say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {' '.join(self.format_usage().split())}")


def main(argv: list[str]) -> int:
    """Compute the row again; -> 0 where it is the same, 1 where it is not, 2 with one line for wrong input."""
    parser = _Parser(prog="replay.py", description="Compute a row of a report or a claim again.")
    parser.add_argument("report", help="the report-*.json of an evaluation, or a claim, here or in object storage")
    parser.add_argument("row", help="its number in the table, from 1, or DEFENSE/ATTACK/RANDOMNESS")
    parser.add_argument("--data", help="where data.uri lies now, on this machine or in object storage")
    parser.add_argument("--defense", help="where the defense lies now; its digest must be the row's")
    parser.add_argument("--trust-code", action="store_true", help="import code that the report or the defense names")
    try:
        given = parser.parse_args(argv)
        torchrun.check_group()
        torchrun.check_alone("a replay is one process")
        return _replay(given)
    except ConfigError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2


def _replay(given: argparse.Namespace) -> int:
    from dircluster.cluster.storage import check_bucket, is_remote, open_path
    from dircluster.evaluation.replay import choose, read_rows
    from dircluster.evaluation.results import name_of

    for name, uri in {"the report's address": given.report, "--data": given.data, "--defense": given.defense}.items():
        if uri is not None and not uri.strip():  # as of a shell's variable that is not set
            raise ConfigError(f"{name} is empty: give a value, or leave it out")
        refuse_secret(name, uri or "")
        if is_remote(uri or ""):
            check_bucket(uri, StorageConfig(), name=name)
    facts, rows = read_rows(open_path(given.report, StorageConfig()))
    row = choose(rows, given.row)
    config, job_spec = _job_spec(facts, given)

    from dircluster.cluster.runtime.evaluation_job import EvaluationJob
    from dircluster.cluster.version import commit
    from dircluster.distributed.launch import local_workers
    from dircluster.evaluation.evaluation import run
    from dircluster.evaluation.provenance import machine
    from dircluster.evaluation.replay import Comparison, spec_of
    from dircluster.evaluation.store import MemoryStore
    from dircluster.evaluation.versions import is_same_code

    here = commit()
    say(f"row      {name_of(row)}: {_accuracy(row)}")
    same_code = is_same_code(here, facts["commit"])
    unknown = "" if same_code or here != facts["commit"] else ", but with changes that no commit holds"
    say(f"code     {_beside(here, facts['commit'])}{unknown}")
    with local_workers(dataclasses.replace(config.scaling, threads=config.scaling.threads or 1)) as parallel:
        job = EvaluationJob(job_spec, parallel.device)
        _check_same(job.facts, facts)
        if row["total"] > len(job.test):
            raise ConfigError(
                f"the row is of {row['total']} images, and the settings of the report judge {len(job.test)}"
            )
        spec = dataclasses.replace(spec_of(row, job.plan.table, job.name), first=row["total"])  # perhaps not all images
        kind = machine(parallel.device)
        say(f"machine  {_beside(kind, facts['machine'])}")
        job.evaluation.specs = [spec]
        job.evaluation.store = job.evaluation.bare_store = MemoryStore()  # what is stored is not asked
        run(job.evaluation, job.batch)
    same = same_code and kind == facts["machine"] and parallel.device.type == "cpu"
    found = Comparison(row, job.evaluation.result(spec, job.name), same)
    images = {True: "the same to the bit", False: "others", None: "the row does not know its own"}[found.same_images]
    say(f"again    {_accuracy(dataclasses.asdict(found.again))}")
    say(f"images   {images} (SHA-256 {found.again.sha256[:12]})")
    say("holds" if found.holds else f"DIFFERS by {100 * found.difference:+.2f} points")
    return 0 if found.holds else 1


def _job_spec(facts: Mapping[str, Any], given: argparse.Namespace) -> tuple[Any, Any]:
    """The run of a report, and what is judged in it. Raises ConfigError where it names code that is not trusted."""
    from dircluster.cluster.loading import FACTORY, JobSpec
    from dircluster.cluster.paths import fetched
    from dircluster.presets import RUNS, run_from_plain, run_to_plain
    from dircluster.zoo import is_shipped

    settings, defense = facts["settings"], str(given.defense or facts["defense"])
    untrusted = ConfigError("the report names code of its own: say that it is trusted (--trust-code)")
    try:
        own = settings["defense"] not in RUNS or (FACTORY.fullmatch(defense) and not is_shipped(defense))
        if own and not given.trust_code:
            raise untrusted
        config = run_from_plain(settings)
        if is_own_code(config.target) and not given.trust_code:
            raise untrusted
        if given.data:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=given.data))
        surrogate = str(facts.get("surrogate_uri") or "")
        # out of storage: the report's may be somebody else's
        defense, surrogate = (fetched(uri, config) for uri in (defense, surrogate))
        spec = JobSpec(run_to_plain(config), defense, os.getcwd(), surrogate, given.trust_code)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the settings of the report cannot be read: {error}") from error
    return config, spec


def _check_same(here: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raise ConfigError where other images or another defense would be judged."""
    if here["data"] != facts["data"]:
        raise ConfigError(f"the row is of other images ({str(facts['data'])[:12]}, not {here['data'][:12]})")
    if here["defense"] != facts["digest"]:
        raise ConfigError(f"{facts['defense']} is not the defense that the row is of (its digest is another)")


def _accuracy(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.2f} % ({row['correct']} of {row['judged']}, n = {row['total']})"


def _beside(here: str, there: Any) -> str:
    return f"{here}, as the row's" if here == there else f"{here}; the row is of {there}"
