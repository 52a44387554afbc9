"""One call behind jobs/train.py: check, record, run by Ray or here, tell the person what came out."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shlex
import time
import uuid
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

from dircluster import cli, torchrun
from dircluster.cli import command
from dircluster.cluster import foretold, preflight, storage
from dircluster.cluster.paths import with_absolute_paths, with_reachable_target
from dircluster.cluster.tracking import place
from dircluster.cluster.version import commit
from dircluster.config import ConfigError, first_line
from dircluster.printing import say


def main(argv: list[str]) -> int:
    """Run the job that ``argv`` describes; -> the process's exit code. Errors are one line on stderr."""
    return cli.execute(cli.TrainJob, argv, _train)


def _train(job: cli.TrainJob) -> int:
    if job.dry_run:
        from dircluster.cluster.commands.plan import plan

        planned = plan(job)
        if _speaks(job):
            say(planned)
        return 0
    return Launch(job).run()


def _speaks(job: cli.TrainJob) -> bool:
    """Whether this process tells how the job goes: alone, or as the first of torchrun's."""
    return job.launcher == "ray" or torchrun.is_first()


class Launch:
    """A job on its way from the command line to its summary."""

    def __init__(self, job: cli.TrainJob) -> None:
        self.job = job
        self.config = with_absolute_paths(job.run)
        self.first = _speaks(job)
        self.commit = commit()
        self.record: Any = None
        self.held = contextlib.ExitStack()
        """What lasts as long as the record is RUNNING."""
        self.began = time.monotonic()

    def run(self) -> int:
        """Train, register, tell; -> exit code. Raises ConfigError before anything was started."""
        from dircluster.cluster.console import Bystander, Terminal

        job = self.job
        storage.to_environment(self.config.storage)
        preflight.check(self.config, on_ray=job.launcher == "ray")
        if job.export is not None:
            from dircluster.training import hub_folder

            hub_folder.check(job.export)
        self.foretold: foretold.Foretold | None = None
        if job.calibration is not None:  # before anything is trained: it may be another preset's
            from dircluster.cluster.commands.plan import foretold_by

            self.foretold = foretold_by(job.calibration, job)
        elif job.summary is not None:
            self.foretold = foretold.kept(self.config, job.launcher)
        storage.check(self.config)
        with Terminal() if self.first else Bystander() as terminal:
            changed = ", ".join(f"{n} {v}" for n, v in cli.describe(job).items() if n not in ("seed", "storage.uri"))
            manner = "starting again beside what is stored" if job.fresh else "reusing and resuming what is stored"
            title = f"{job.run.name}, seed {job.run.seed}" + (f", {changed}" if changed else "")
            terminal.say(f"{title}: {manner} in {job.run.storage.uri}")
            status, busy, aside = "FAILED", False, ThreadPoolExecutor(1)
            try:
                outcome = self._train(terminal, aside)
                status, busy = outcome["status"], bool(outcome.get("busy"))
            except SystemExit:  # asked twice to stop
                status = "KILLED"
                raise
            finally:
                aside.shutdown(cancel_futures=True)  # what has begun ends, and only that
                self.held.close()
                if self.record is not None:
                    from dircluster.cluster.tracking.jobs import finish_job, hand_back

                    if busy:  # perhaps with the very same job: its run is this one
                        hand_back(self.record)
                    else:
                        finish_job(self.record, status, terminal.say)
            if self.first:
                try:
                    self._tell(outcome, terminal)
                except ConfigError as error:
                    if status == "FINISHED":
                        raise
                    terminal.say(str(error))  # the error that the run ended by follows
        if status == "FINISHED":
            return 0
        if status == "KILLED":
            return 128 + int(outcome["signal"])
        cli.say_error(str(outcome["error"]))
        return int(outcome["exit"])

    def _train(self, terminal: Any, aside: Executor) -> dict[str, Any]:
        """The outcome. MLflow is busy ``aside`` while Ray starts and ends."""
        config, owner = self.config, uuid.uuid4().hex  # under torchrun the first worker's counts
        if self.job.launcher == "local":
            from dircluster.cluster.runtime import local

            config = with_reachable_target(config)
            self._open_record(terminal)
            outcome = local.train(config, owner, self.job.fresh, self.record, terminal)
            self._register(outcome, terminal)
            return outcome
        from dircluster.cluster.runtime import driver

        config, registering = with_reachable_target(config), list[Future[None]]()
        if self._may_be_refused():
            opening = aside.submit(self._open_record, terminal)
            opening.result()
        else:
            aside.submit(importlib.import_module, "dircluster.cluster.runtime.ray_train")
            opening = aside.submit(self._open_record, terminal)
        outcome = driver.train(
            config,
            owner,
            self.job.fresh,
            opening.result,
            terminal,
            lambda outcome: registering.append(aside.submit(self._register, outcome, terminal)),
        )
        for future in registering:
            future.result()
        return outcome

    def _may_be_refused(self) -> bool:
        """Whether MLflow is a server, which may not answer."""
        named = self.config.tracking.enabled and place.named(self.config)
        return bool(named) or storage.is_remote(self.config.storage.uri)

    def _open_record(self, terminal: Any) -> Any:
        """The JobRecord, kept as ``self.record``; None where none is wanted, or where MLflow is not installed."""
        if not self.first or not self.config.tracking.enabled:
            return None
        if self.job.launcher == "local":
            from dircluster.cluster.runtime import local

            if not local.has_mlflow():
                terminal.say("MLflow is not installed: no record is kept")
                return None
        from dircluster.cluster.tracking.jobs import open_job
        from dircluster.cluster.tracking.owners import beating

        tags = {
            "dircluster.commit": self.commit,
            "dircluster.launcher": self.job.launcher,
            "dircluster.workers": str(self.config.scaling.workers),
            "dircluster.command": command(self.job),
        }
        self.record = open_job(self.config, tags, fresh=self.job.fresh)
        self.held.enter_context(beating(self.record.uri, self.record.run_id))
        return self.record

    def _register(self, outcome: dict[str, Any], terminal: Any) -> None:
        if outcome["status"] != "FINISHED" or self.record is None:
            return
        from dircluster.cluster.tracking.jobs import describe_run, log_dataset, log_files, log_target
        from dircluster.cluster.tracking.registry import register
        from dircluster.evaluation.model_card import model_card

        folder, data = storage.open_path(outcome["checkpoint"], self.config.storage), self.config.data
        card = model_card(self.job.run, outcome, self.commit)
        texts = {"model_card.md": card, "config.yaml": cli.to_yaml(self.job.run)}
        try:
            log_dataset(self.record, data.name, outcome["data"], data.uri or data.name)
            log_target(self.record, outcome["target"])
            log_files(self.record, texts)
            describe_run(self.record, card)
            outcome["model"], outcome["champion"] = register(
                self.record, self.config, storage.local_copy(folder), card, outcome
            )
        except Exception as error:  # the defense is in its folder, whatever MLflow says
            terminal.say(f"MLflow could not register the model: {first_line(error)}; it is in {folder}")

    def _export(self, outcome: dict[str, Any], terminal: Any) -> None:
        if self.job.export is None:
            return
        from dircluster.evaluation.model_card import model_card
        from dircluster.training import hub_folder

        card = model_card(self.job.run, outcome, self.commit, str(self.job.export.resolve().name))
        hub_folder.write(storage.open_path(outcome["checkpoint"], self.config.storage), self.job.export, card)
        terminal.say(f"exported  {self.job.export}")

    def _tell(self, outcome: dict[str, Any], terminal: Any) -> None:
        seconds = time.monotonic() - self.began
        if outcome["status"] == "FINISHED":
            terminal.table(outcome["results"])
            terminal.say(f"defense   {outcome['checkpoint']}")
            if outcome.get("model"):
                terminal.say(f"model     {outcome['model']}")
                terminal.say(f"champion  {outcome['champion']}")
        if self.record is not None:
            uri = self.record.uri
            look = f"make ui, or: mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri.startswith("sqlite") else uri
            terminal.say(f"MLflow    {look}  (run {self.record.run_id})")
        if outcome["status"] == "FINISHED":
            terminal.say(f"judge it  {command(self.job, 'evaluate')} --defense {shlex.quote(outcome['checkpoint'])}")
            terminal.say(f"took      {seconds:.0f} s")
        if outcome["status"] == "KILLED":
            again = cli.continued(command(self.job), self.job)
            terminal.say(f"stopped by signal {outcome['signal']}; resume with: {again}")
        cli.write_summary(self.job, self._summary(outcome, seconds))
        if outcome["status"] == "FINISHED":
            self._export(outcome, terminal)

    def _summary(self, outcome: dict[str, Any], seconds: float) -> dict[str, Any]:
        summary = {
            "status": outcome["status"],
            "preset": self.job.preset,
            "defense": self.job.defense,
            "name": self.job.run.name,
            "seed": self.job.run.seed,
            "changed": cli.describe(self.job),
            "commit": self.commit,
            "seconds": round(seconds, 1),
            "run_id": None if self.record is None else self.record.run_id,
            "model": outcome.get("model"),
            "champion": outcome.get("champion"),
            "checkpoint": outcome.get("checkpoint"),
            "target": outcome.get("target"),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "selection": outcome.get("selection", {}),
            "took": {name: round(value, 1) for name, value in outcome.get("seconds", {}).items()},
            "results": outcome.get("results", []),
        }
        if self.foretold is not None:
            summary["foretold_on"] = self.foretold.device
            summary["foretold"] = foretold.beside(self.foretold, outcome, self.job.run.storage)
        if "error" in outcome:
            summary["error"] = outcome["error"]
        return summary
