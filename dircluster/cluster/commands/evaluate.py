"""One call behind jobs/evaluate.py: judge a defense, on Ray workers or here, and keep and tell what was found."""

from __future__ import annotations

import dataclasses
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dircluster import cli
from dircluster.config import ConfigError, RunConfig, refuse_secret, to_dict

if TYPE_CHECKING:
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.loading import Brief
    from dircluster.cluster.runtime.evaluation_job import Bench


def main(argv: list[str]) -> int:
    """Judge the defense that ``argv`` names; -> exit code. Errors are one line on stderr."""
    return cli.execute(cli.EvaluateJob, argv, _judge)


def _judge(job: cli.EvaluateJob) -> int:
    from dircluster.cluster import storage
    from dircluster.cluster.console import Bystander, Terminal
    from dircluster.cluster.paths import with_absolute_paths
    from dircluster.cluster.runtime.evaluation_job import with_suite

    if not job.defense:
        raise ConfigError(
            "--defense is missing: give the folder of a checkpoint, models:/NAME@champion,"
            " package.module:factory, or none"
        )
    refuse_secret("--defense", job.defense)
    if job.verdict and job.no_verdict:
        raise ConfigError("--verdict and --no-verdict exclude each other: leave one out")
    suite = job.suite or job.run.evaluation.suite
    asked = job.verdict or job.run.evaluation.verdict or suite != "quick"
    config = with_suite(job.run, suite, asked and not job.no_verdict)
    config = with_absolute_paths(config)
    storage.check(config)
    first = job.launcher == "ray" or os.environ.get("RANK", "0") == "0"
    with Terminal() if first else Bystander() as terminal:
        signal = _Judging(job, config, terminal, first).run()
        if signal:
            terminal.say("stopped; what is finished is kept, and the same command goes on")
    return 128 + signal if signal else 0


class _Judging:
    """One judgement, from the command line to its report."""

    def __init__(self, job: cli.EvaluateJob, config: RunConfig, terminal: Terminal, first: bool) -> None:
        self.job, self.config, self.terminal, self.first = job, config, terminal, first
        self.workers = config.scaling.most if "scaling.workers" in job.given else None
        self.began, self.done = time.monotonic(), 0
        self.natural_target = ""

    def run(self) -> int:
        """Judge; -> the signal that stopped it, or 0."""
        from dircluster.distributed.launch import local_workers

        threads = self.config.scaling.threads or 1  # so that the bits do not depend on how many share a machine
        scaling = dataclasses.replace(self.config.scaling, threads=threads)
        if self.job.launcher == "ray":
            scaling = dataclasses.replace(scaling, device="cpu")  # of this process; the workers have their own
        with local_workers(scaling) as parallel:
            brief = self._brief(parallel)
            benches: list[Bench] = []
            parallel.first_does(lambda: benches.append(self._bench(brief, parallel)))  # one download, or one error
            bench = benches[0] if benches else self._bench(brief, parallel)
            open_places = parallel.share(self._open_places(bench))
            if self.job.launcher == "ray":
                signal = self._on_ray(brief, bench, open_places)
            else:
                signal = self._here(bench, open_places, parallel)
            if signal:
                return signal
            if self.first:
                signal = bench.judgement.wait(self.terminal.stop_signal)  # no collective: others may take long
                if signal:
                    return signal
                self._tell(bench)
        return 0

    def _brief(self, parallel: Any) -> Brief:
        """What is judged, with every model where all workers can read it."""
        from dircluster.cluster.loading import Brief

        named = [self.job.defense, self.job.surrogate, self.job.natural_target, self.config.target.uri or ""]
        found: list[str] = parallel.first_does(lambda: [self._reachable(uri) for uri in named])
        defense, surrogate, self.natural_target, target = found
        if target:
            self.config = dataclasses.replace(self.config, target=dataclasses.replace(self.config.target, uri=target))
        return Brief(to_dict(self.config), defense, os.getcwd(), surrogate, self.job.trust_code, self.job.keep_images)

    def _reachable(self, uri: str) -> str:
        from dircluster.cluster.loading import FACTORY
        from dircluster.cluster.runtime import local
        from dircluster.cluster.storage import is_remote

        if uri.startswith("models:/"):
            if not local.has_mlflow():
                raise ConfigError(f"{uri} is fetched with MLflow, which is not installed")
            from dircluster.cluster.tracking.registry import reachable

            return reachable(uri, self.config)
        if uri in ("", "none") or is_remote(uri) or uri.startswith("timm:") or FACTORY.fullmatch(uri):
            return uri
        return str(Path(uri.removeprefix("file://")).expanduser().resolve())  # workers live in other folders

    def _bench(self, brief: Brief, parallel: Any) -> Bench:
        """This process's bench. Where Ray's workers do the work, it stays on the CPU."""
        import torch

        from dircluster.cluster.runtime.evaluation_job import Bench

        return Bench(brief, torch.device("cpu") if self.job.launcher == "ray" else parallel.device)

    def _open_places(self, bench: Bench) -> list[int]:
        places = [place for place, unit in enumerate(bench.units) if bench.judgement.outcome(unit) is None]
        kept = len(bench.units) - len(places)
        resumed = f", {kept} of {len(bench.units)} units are finished already" if kept and places else ""
        self.terminal.say(
            f"judging {self.job.defense}: suite {bench.settings.suite}, {len(bench.test)} images{resumed}"
        )
        if not places:
            self.terminal.say(f"evaluation: reused from {bench.folder}")
        return places

    def _on_ray(self, brief: Brief, bench: Bench, places: list[int]) -> int:
        from dircluster.cluster.runtime import ray_evaluate

        if not places:
            return 0
        brief = dataclasses.replace(brief, key=bench.key)
        return ray_evaluate.work(
            brief,
            self.config,
            self.workers,
            places,
            self.terminal,
            lambda place: self._finished(bench, place, len(places)),
        )

    def _here(self, bench: Bench, places: list[int], parallel: Any) -> int:
        from dircluster.defenses.base import DefendedClassifier
        from dircluster.training.interrupt import Interrupted, interruptible

        module = bench.subject.module
        heard = module.classifier if isinstance(module, DefendedClassifier) else module
        mine = places[parallel.rank :: parallel.world]
        try:
            with interruptible(heard, self.terminal):
                for place in mine:
                    bench.work(place)
                    self._finished(bench, place, len(mine))
        except Interrupted as stop:
            return stop.signal
        return 0

    def _finished(self, bench: Bench, place: int, total: int) -> None:
        self.done += 1
        elapsed, case = time.monotonic() - self.began, bench.units[place].case
        left = timedelta(seconds=round(elapsed / self.done * (total - self.done)))
        self.terminal.say(f"{self.done}/{total}  {case.name}, masks {case.masks}  ETA {left}")

    def _tell(self, bench: Bench) -> None:
        from dircluster.cluster.loading import load_classifier
        from dircluster.cluster.version import commit
        from dircluster.evaluation.html_report import write_report
        from dircluster.evaluation.results import to_plain
        from dircluster.evaluation.session import report

        found = report(bench.judgement, bench.plan, bench.name, bench.settings)
        self.terminal.table(to_plain(found.rows))
        for finding in found.verdict:
            self.terminal.say(f"{'passed ' if finding.passed else 'FLAGGED'}  {finding.question}  {finding.answer}")
        facts = {**bench.facts, "commit": commit(), "name": self.config.name, "defense": self.job.defense}
        natural = load_classifier(self.natural_target, self.config) if self.natural_target else None
        files = write_report(
            found, bench.subject, bench.test, self.config, facts, bench.folder, natural, self.terminal.say
        )
        for file in files:
            self.terminal.say(f"report    {file}")
        run_id = self._record(found, facts, files) if self.config.tracking.enabled else None
        if run_id:
            self.terminal.say(f"MLflow    run {run_id}")
        self.terminal.say(f"took      {time.monotonic() - self.began:.0f} s")
        outcome = {**found.to_plain(), "results": to_plain(found.rows), "run_id": run_id, "facts": facts}
        cli.write_summary(self.job, outcome)

    def _record(self, found: Any, facts: dict[str, Any], files: list[Path]) -> str | None:
        from dircluster.cluster.runtime import local

        if self.job.launcher == "local" and not local.has_mlflow():
            return None
        from dircluster.cluster.tracking.jobs import record_evaluation

        try:
            return record_evaluation(self.config, facts, found.to_plain(), files)
        except ConfigError as error:  # the report is in its folder, whatever MLflow says
            self.terminal.say(str(error))
            return None
