"""One call behind jobs/evaluate.py: judge a defense, on Ray workers or here, and keep and tell what was found."""

from __future__ import annotations

import dataclasses
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dircluster import cli, torchrun, zoo
from dircluster.config import (
    ConfigError,
    RunConfig,
    StoppedError,
    first_line,
    local_path,
    named_line,
    real_path,
    refuse_secret,
)
from dircluster.presets import run_to_plain

if TYPE_CHECKING:
    from torch import nn

    from dircluster.cluster.console import Terminal
    from dircluster.cluster.loading import JobSpec
    from dircluster.cluster.runtime.evaluation_job import EvaluationJob


def main(argv: list[str]) -> int:
    """Judge the defense that ``argv`` names; -> exit code. Errors are one line on stderr."""
    return cli.execute(cli.EvaluateJob, argv, _judge, settled)


def settled(job: cli.EvaluateJob) -> cli.EvaluateJob:
    """``job`` with its suite and verdict among the settings of the run. Raises ConfigError."""
    if job.verdict and job.no_verdict:
        raise ConfigError("--verdict and --no-verdict exclude each other: leave one out")
    settings = job.run.evaluation
    suite = job.suite or settings.suite
    made = dataclasses.replace(settings, suite=suite)
    asked = settings.verdict if job.given & {"evaluation.verdict", "evaluation.no-verdict"} else made.thorough
    made = dataclasses.replace(made, verdict=job.verdict or (asked and not job.no_verdict))
    return dataclasses.replace(job, run=dataclasses.replace(job.run, evaluation=made))


def _judge(job: cli.EvaluateJob) -> int:
    from dircluster.cluster import preflight, storage
    from dircluster.cluster.console import Bystander, Terminal
    from dircluster.cluster.paths import with_absolute_paths

    if not job.defense:
        raise ConfigError(
            "--defense is missing: give the folder of a checkpoint, models:/NAME@champion, zoo:NAME,"
            " package.module:factory, or none"
        )
    named = {"--defense": job.defense, "--surrogate": job.surrogate, "--natural-target": job.natural_target}
    for name, uri in named.items():
        refuse_secret(name, uri)
    if job.export is not None:
        from dircluster.evaluation.export import check_export

        check_export(job.export)
        if job.summary is not None and real_path(job.summary) == real_path(job.export.with_suffix(".json")):
            raise ConfigError(f"--summary {job.summary} is where --export writes its claim: give it another name")
    other: tuple[str, dict[str, Any]] | None = None
    if job.compare is not None:
        from dircluster.evaluation.report_images import read_report

        other = str(job.compare), read_report(job.compare)
    config = with_absolute_paths(job.run)
    storage.to_environment(config.storage)
    on_ray = job.launcher == "ray"
    preflight.check(config, on_ray, trains=False)
    for name, uri in named.items():
        if uri not in ("", "none"):
            preflight.check_model(name, uri, config, preflight.elsewhere(on_ray))
    storage.check(config)
    first = on_ray or torchrun.is_first()
    with Terminal() if first else Bystander() as terminal:
        try:
            signal = _Judging(job, config, terminal, first, other).run()
        except storage.troubles() as error:
            raise StoppedError.of("evaluation", named_line(error)) from error
        if signal:
            terminal.say("stopped; what is finished is kept, and the same command goes on")
    return 128 + signal if signal else 0


class _Judging:
    """One evaluation, from the command line to its report."""

    def __init__(
        self,
        job: cli.EvaluateJob,
        config: RunConfig,
        terminal: Terminal,
        first: bool,
        other: tuple[str, dict[str, Any]] | None,
    ) -> None:
        """``other`` is the name and the JSON of the report to show beside this one."""
        self.job, self.config, self.terminal, self.first, self.other = job, config, terminal, first, other
        self.workers = config.scaling.most if "scaling.workers" in job.given else None
        self.began, self.done = time.monotonic(), 0
        self.natural_target: nn.Module | None = None

    def run(self) -> int:
        """Judge; -> the signal that stopped it, or 0."""
        from dircluster.distributed.launch import local_workers

        threads = self.config.scaling.threads or 1  # so that the bits do not depend on how many share a machine
        scaling = dataclasses.replace(self.config.scaling, threads=threads)
        if self.job.launcher == "ray":
            scaling = dataclasses.replace(scaling, device="cpu")  # of this process; the workers have their own
        with local_workers(scaling) as parallel:
            job_spec = self._make_job_spec(parallel)
            evaluation_jobs: list[EvaluationJob] = []
            parallel.first_does(
                lambda: evaluation_jobs.append(self._make_evaluation_job(job_spec, parallel))
            )  # one download, or one error
            evaluation_job = evaluation_jobs[0] if evaluation_jobs else self._make_evaluation_job(job_spec, parallel)
            open_indices = parallel.share(self._open_indices(evaluation_job))
            if self.job.launcher == "ray":
                signal = self._on_ray(job_spec, evaluation_job, open_indices)
            else:
                signal = self._here(evaluation_job, open_indices, parallel)
            if signal:
                return signal
            if self.first:
                signal = evaluation_job.evaluation.wait(
                    self.terminal.stop_signal
                )  # no collective: others may take long
                if signal:
                    return signal
                self._tell(evaluation_job)
        return 0

    def _make_job_spec(self, parallel: Any) -> JobSpec:
        """What is judged, with every model where all workers can read it; and what the report alone needs."""
        from dircluster.cluster.loading import JobSpec, finished, load_classifier, located

        def reachable() -> list[str]:
            given, path = located(self.job.defense)
            named = [given, self.job.surrogate, self.job.natural_target, self.config.target.uri or ""]
            defense, *models = [self._reachable(uri) for uri in named]
            return [path, finished(defense, self.config), *models]

        def load_natural_target() -> None:  # at the end it would be late to refuse it
            self.natural_target = load_classifier(natural, self.config)

        path, defense, surrogate, natural, target = parallel.first_does(reachable)
        if target:
            self.config = dataclasses.replace(self.config, target=dataclasses.replace(self.config.target, uri=target))
        if natural:
            parallel.first_does(load_natural_target)
        kept = self.job.keep_images or self.job.export is not None
        return JobSpec(run_to_plain(self.config), defense, path, surrogate, self.job.trust_code, kept)

    def _reachable(self, uri: str) -> str:
        from dircluster.cluster.loading import FACTORY
        from dircluster.cluster.paths import reachable
        from dircluster.cluster.storage import is_remote

        if uri.startswith("models:/"):
            return reachable(uri, self.config)
        given = is_remote(uri) or zoo.is_shipped(uri) or uri.startswith("timm:")
        if uri in ("", "none") or given or FACTORY.fullmatch(uri):
            return uri
        return str(real_path(local_path(uri)))  # workers live in other folders

    def _make_evaluation_job(self, job_spec: JobSpec, parallel: Any) -> EvaluationJob:
        """This process's evaluation job. Where Ray's workers do the work, it stays on the CPU."""
        import torch

        from dircluster.cluster.runtime.evaluation_job import EvaluationJob

        made = EvaluationJob(job_spec, torch.device("cpu") if self.job.launcher == "ray" else parallel.device)
        if self.other is not None:
            from dircluster.evaluation.report_images import check_same_data

            check_same_data(self.other[1], made.facts["data"], Path(self.other[0]))
        return made

    def _open_indices(self, evaluation_job: EvaluationJob) -> list[int]:
        indices = evaluation_job.open_indices()
        kept = len(evaluation_job.shards) - len(indices)
        resumed = f", {kept} of {len(evaluation_job.shards)} shards are finished already" if kept and indices else ""
        self.terminal.say(
            f"judging {self.job.defense}: suite {evaluation_job.settings.suite},"
            f" {len(evaluation_job.test)} images{resumed}"
        )
        if not indices:
            self.terminal.say(f"evaluation: reused from {evaluation_job.folder}")
        return indices

    def _on_ray(self, job_spec: JobSpec, evaluation_job: EvaluationJob, indices: list[int]) -> int:
        from dircluster.cluster.runtime import ray_evaluate

        if not indices:
            return 0
        job_spec = dataclasses.replace(job_spec, key=evaluation_job.key)
        return ray_evaluate.work(
            job_spec,
            self.config,
            self.workers,
            indices,
            self.terminal,
            lambda index: self._finished(evaluation_job, index, len(indices)),
        )

    def _here(self, evaluation_job: EvaluationJob, indices: list[int], parallel: Any) -> int:
        from dircluster.evaluation.sharing import shares

        share = shares(evaluation_job.evaluation, parallel.world)[parallel.rank]
        mine = [index for index in indices if index in share]
        return evaluation_job.work_here(
            mine, self.terminal, lambda index: self._finished(evaluation_job, index, len(mine))
        )

    def _finished(self, evaluation_job: EvaluationJob, index: int, total: int) -> None:
        self.done += 1
        elapsed, spec = time.monotonic() - self.began, evaluation_job.shards[index].spec
        left = timedelta(seconds=round(elapsed / self.done * (total - self.done)))
        self.terminal.say(f"{self.done}/{total}  {spec.name}, randomness {spec.randomness}  ETA {left}")

    def _tell(self, evaluation_job: EvaluationJob) -> None:
        from dircluster.evaluation.html_report import write_report
        from dircluster.evaluation.results import to_plain

        found = evaluation_job.report()
        for note in found.notes:
            self.terminal.say(f"note      {note}")
        self.terminal.table(to_plain(found.rows))
        for check in found.verdict:
            self.terminal.say(f"{'passed ' if check.passed else 'FLAGGED'}  {check.question}  {check.answer}")
        facts = evaluation_job.report_facts(self.job.defense, self.job.surrogate)
        files = write_report(
            found,
            evaluation_job.victim,
            evaluation_job.test,
            self.config,
            facts,
            evaluation_job.folder,
            self.natural_target,
            self.terminal.say,
            evaluation_job.rows,
            self.other,
        )
        for file in files:
            self.terminal.say(f"report    {file}")
        run_id = (
            self._record(found, facts, files, evaluation_job.facts["defense"]) if self.config.tracking.enabled else None
        )
        if run_id:
            self.terminal.say(f"MLflow    run {run_id}")
            self._note(found, evaluation_job.facts)
        outcome = {**found.to_plain(), "results": to_plain(found.rows), "run_id": run_id, "facts": facts}
        cli.write_summary(self.job, outcome)
        if self.job.export is not None:
            from dircluster.evaluation.export import exported, write_export

            claim = evaluation_job.claim(found, facts)
            tensors = exported(found, evaluation_job.test, evaluation_job.rows)
            for file in write_export(tensors, claim, self.job.export):
                self.terminal.say(f"export    {file}")
        self.terminal.say(f"took      {time.monotonic() - self.began:.0f} s")

    def _record(self, found: Any, facts: dict[str, Any], files: list[Path], sha: str) -> str | None:
        from dircluster.cluster.runtime import local

        if self.job.launcher == "local" and not local.has_mlflow():
            return None
        from dircluster.cluster.tracking.jobs import record_evaluation

        try:
            return record_evaluation(self.config, facts, found.to_plain(), files, sha)
        except ConfigError as error:  # the report is in its folder, whatever MLflow says
            self.terminal.say(str(error))
            return None

    def _note(self, found: Any, facts: dict[str, Any]) -> None:
        """Where the defense is registered, tell its versions what was found, and whether one is champion now."""
        from dircluster.cluster.tracking.registry import judged

        try:
            for line in judged(self.config, facts["defense"], found.to_plain(), facts["data"]):
                self.terminal.say(f"champion  {line}")
        except Exception as error:  # the report and its run are there, whatever the registry says
            self.terminal.say(f"MLflow could not note the evaluation with its model: {first_line(error)}")
