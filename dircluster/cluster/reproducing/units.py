"""The units of a plan, each trained or judged once: what is stored is found again, what fails is told in a line."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dircluster.cluster.console import Terminal
from dircluster.cluster.loading import JobSpec
from dircluster.cluster.outcome import reason_of
from dircluster.cluster.paths import with_absolute_paths
from dircluster.cluster.plain_store import Store
from dircluster.cluster.storage import open_path
from dircluster.cluster.sweeps.store import key_of
from dircluster.cluster.version import source_version
from dircluster.config import ConfigError, RunConfig, digest, named_line, with_values
from dircluster.evaluation.claims import problem_of
from dircluster.presets import run_to_plain
from dircluster.reproduction.cells import Outcome
from dircluster.reproduction.plan import Plan, Training, Transfer, Unit
from dircluster.reproduction.transfer import transferred
from dircluster.training import checkpoint
from dircluster.training.retry import retry

WAIT = 10.0
"""Seconds until a stage that another job trains is looked at again."""


class Listening(Terminal):
    """A terminal that knows the last line that it showed."""

    last = ""

    def say(self, line: str) -> None:
        lines = line.strip().splitlines()
        self.last = lines[-1] if lines else self.last
        super().say(line)


class Units:
    """Brings units of a plan to their ends."""

    def __init__(self, plan: Plan, launcher: str, terminal: Listening, record: Any, tags: Mapping[str, str]) -> None:
        """``record`` is the JobRecord that theirs are children of, None where none is kept; ``tags`` are theirs."""
        self.plan, self.launcher, self.terminal, self.record, self.tags = plan, launcher, terminal, record, tags
        self.outcomes: dict[str, Outcome] = {}
        """Of what is over, by key."""

    def run(self) -> int:
        """All units; -> the signal that stopped it, or 0. Raises ConfigError where the cluster cannot be used."""
        units = self.plan.all
        for number, unit in enumerate(units, 1):
            self.terminal.say(f"{number} of {len(units)}: {unit.name}")
            ended = self._trained(unit) if isinstance(unit, Training) else self._judged(unit)
            if isinstance(ended, int):
                return ended
            if ended.error:
                self.terminal.say(f"failed: {unit.name}: {ended.error}")
            self.outcomes[unit.key] = ended
        return 0

    def _trained(self, training: Training) -> Outcome | int:
        run = with_absolute_paths(training.run)
        kept, name = _kept(run), _called(run)
        found: Outcome | int | None = _found(kept, name, run)
        if isinstance(found, Outcome):
            self.terminal.say(f"reused: {found.checkpoint}")
            if found.claim is None or problem_of(found.claim):  # such as one of code that is committed by now
                found = self._claimed(training, run, kept, name, found)
            return found if isinstance(found, int) else self._noted(run, training, found)
        try:
            ended = self._follow(run, training)
        except ConfigError:
            raise  # of the cluster or the records: no other system would fare better
        except Exception as error:  # whatever a system raises is its own
            return Outcome(error=named_line(error))
        if ended["status"] == "KILLED":
            return int(ended["signal"])
        if ended["status"] == "FAILED":
            reason = str(ended["error"])
            return Outcome(error=self.terminal.last if reason.endswith("stands above") else reason.splitlines()[0])
        done = Outcome(tuple(ended["results"]), ended["checkpoint"], trained_by=ended["trained_by"])
        return self._claimed(training, run, kept, name, done)

    def _follow(self, run: RunConfig, training: Training) -> dict[str, Any]:
        """The outcome of a run, once no other job trains one of its stages."""
        from dircluster.cluster.runtime import local

        record, owner, status = self._child(run, training), uuid.uuid4().hex, "FAILED"
        try:
            while True:
                if self.launcher == "local":
                    ended = local.train(run, owner, False, record, self.terminal)
                else:
                    from dircluster.cluster.runtime import driver

                    ended = driver.train(run, owner, False, lambda: record, self.terminal, lambda outcome: None)
                if ended.get("busy") and (signal := self.terminal.stop_signal()):
                    ended = {"status": "KILLED", "signal": signal}
                if not ended.get("busy"):
                    status = ended["status"]
                    return ended
                time.sleep(WAIT)
        finally:
            if record is not None:
                from dircluster.cluster.tracking.jobs import finish_job

                finish_job(record, status)

    def _child(self, run: RunConfig, unit: Unit) -> Any:
        if self.record is None:
            return None
        from dircluster.cluster.tracking.jobs import Child, open_job

        onto = {"onto": unit.system.onto} if unit.system.onto else {}
        params = {"system": unit.system.name, **onto, **unit.system.settings, "seed": unit.seed}
        child = Child(self.record.run_id, unit.name, params)
        with contextlib.suppress(ConfigError):  # a server that stays away must not end a night's work
            return retry(
                lambda: open_job(run, self.tags, child=child),
                patience=run.tracking.patience,
                longest_pause=WAIT,
                stopped=lambda: bool(self.terminal.stop_signal()),
            )
        return None

    def _noted(self, run: RunConfig, unit: Unit, done: Outcome) -> Outcome:
        """An outcome that no training of this job records: it is a child of the run in MLflow too."""
        record = self._child(run, unit) if done.claim is not None else None
        if record is not None:
            from dircluster.cluster.tracking.jobs import finish_job, record_rows

            with contextlib.suppress(ConfigError):
                record_rows(record, run, done.claim["facts"]["data"], done.rows)  # type: ignore[index]
            finish_job(record, "FINISHED")
        return done

    def _judged(self, transfer: Transfer) -> Outcome | int:
        """A purifier in front of another target: judged alone."""
        purifier, target = (self.outcomes[key] for key in (transfer.purifier, transfer.target))
        if not purifier.checkpoint or not target.checkpoint:
            return Outcome(error=purifier.error or target.error)
        run = with_absolute_paths(self.plan.run_of(transfer))
        try:
            one, other = (open_path(each.checkpoint, run.storage) for each in (purifier, target))
            storage, owner = open_path(run.storage.uri, run.storage), uuid.uuid4().hex
            made = transferred(storage, one, other, owner, self.terminal.say, run.storage.patience)
            folder = str(made.absolute())
            claim = self._claim(run, folder)
        except Exception as error:  # whatever a system raises is its own
            return Outcome(error=reason_of(error))
        if isinstance(claim, int):
            return claim
        trained_by = {**purifier.trained_by, f"{transfer.system.onto} target": target.trained_by.get("target", ())}
        return self._noted(run, transfer, Outcome(tuple(claim["rows"]), folder, claim=claim, trained_by=trained_by))

    def _claimed(self, training: Training, run: RunConfig, kept: Store, name: str, done: Outcome) -> Outcome | int:
        """The outcome of a training with its claim, kept; without, with a line that says why, where there is none."""
        try:
            claim = self._claim(run, done.checkpoint)
        except Exception as error:  # its numbers stand without one
            self.terminal.say(f"no claim of {training.name}: {reason_of(error)}")
            claim = None
        if isinstance(claim, int):
            return claim
        done = replace(done, claim=claim)
        _keep(kept, name, run, done)
        return done

    def _claim(self, run: RunConfig, folder: str) -> dict[str, Any] | int:
        """The suite's rows of a finished defense with their evidence, as jobs/evaluate.py finds them; or the signal
        that stopped it. What is judged already is not judged again, and no verdict is asked, as in trainings.
        """
        from dircluster.cluster.runtime.evaluation_job import EvaluationJob
        from dircluster.distributed.launch import local_workers

        run = with_values(run, {"evaluation.verdict": False})
        on_ray, spec = self.launcher == "ray", JobSpec(run_to_plain(run), folder, os.getcwd(), trust_code=True)
        scaling = run.scaling
        if on_ray:  # the workers have devices and threads of their own
            scaling = replace(scaling, device="cpu", threads=scaling.threads or 1)
        with local_workers(scaling) as parallel:
            judged = EvaluationJob(spec, parallel.device)
            left = judged.open_indices()
            if signal := self._on_ray(judged, spec, left) if on_ray else judged.work_here(left, self.terminal):
                return signal
            return judged.claim(judged.report(), judged.report_facts(folder))

    def _on_ray(self, judged: Any, spec: JobSpec, left: list[int]) -> int:
        from dircluster.cluster.runtime import ray_evaluate

        if not left:
            return 0
        return ray_evaluate.work(
            replace(spec, key=judged.key), judged.config, None, left, self.terminal, lambda index: None
        )


def judged_trainings(plan: Plan) -> set[str]:
    """Keys of the trainings of a plan whose numbers are kept, with their claims: nothing is left to do for them."""
    runs = {key: with_absolute_paths(training.run) for key, training in plan.trainings.items()}
    there = {key: _found(_kept(run), _called(run), run) for key, run in runs.items()}
    return {key for key, found in there.items() if found is not None and found.claim is not None}


def _called(run: RunConfig) -> str:
    """What the outcome of a run is kept as, for this code."""
    return digest([key_of(run), source_version()])[:24]


def _kept(run: RunConfig) -> Store:
    """What trainings have given, for any table to find."""
    return Store(open_path(run.storage.uri, run.storage) / "reproductions" / "outcomes")


def _keep(kept: Store, name: str, run: RunConfig, done: Outcome) -> None:
    sha256 = checkpoint.digest(open_path(done.checkpoint, run.storage))
    found = {"rows": done.rows, "checkpoint": done.checkpoint, "digest": sha256, "claim": done.claim}
    kept.put(name, {**found, "trained_by": done.trained_by})


def _found(kept: Store, name: str, run: RunConfig) -> Outcome | None:
    """What was kept, while the very defense that it is of is there too: what does not say which is judged again."""
    found = kept.get(name)
    if found is None or not found.get("digest"):
        return None
    if checkpoint.digest(open_path(found["checkpoint"], run.storage)) != found["digest"]:
        return None
    return Outcome(
        tuple(found["rows"]), found["checkpoint"], claim=found["claim"], trained_by=found.get("trained_by", {})
    )
