"""What is asked, on its way from the command line through the plan and its units to the page."""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dircluster import cli
from dircluster.cluster import preflight
from dircluster.cluster.paths import with_absolute_paths
from dircluster.cluster.plain_store import Store
from dircluster.cluster.reproducing.result import Result
from dircluster.cluster.reproducing.stored import find_stored, judged_units
from dircluster.cluster.reproducing.units import Listening, Units, judged_trainings
from dircluster.cluster.storage import open_path, opener
from dircluster.cluster.sweeps.store import key_of
from dircluster.cluster.version import commit
from dircluster.config import ConfigError, RunConfig, digest, named_line
from dircluster.data.layout import data_cache, split_sizes
from dircluster.distributed.launch import local_workers
from dircluster.reproduction.costs import TIMED, Cost, by_kind, calibrated, costs, factor_for
from dircluster.reproduction.exhibits import Exhibit, Settings
from dircluster.reproduction.plan import Plan, Unit, make_plan
from dircluster.settings_file import as_words
from dircluster.training.forecast import EVALUATION, Calibration, as_launched, from_plain, to_plain


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    job: cli.ReproduceJob
    exhibits: tuple[Exhibit, ...]
    only: tuple[str, ...]
    """Systems, all where it is empty."""
    given: Settings
    """To all systems; neither the seed nor the suite."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.job.run.seed, self.job.run.seed + self.job.seeds))

    def plan(self, factor: float) -> Plan:
        """The cheapest trainings for it, their schedules ``factor`` times the presets'."""
        return make_plan(
            self.exhibits,
            self.job.preset,
            self.given,
            self.seeds,
            self.only,
            lambda run, until: key_of(with_absolute_paths(run), until),
            factor,
        )

    def command(self, what: str = "", only: tuple[str, ...] = (), seed: int | None = None) -> str:
        """What goes on, or shows the result again; of ``what`` of it alone, of systems and a seed where they are given.

        A budget is shared out over all that is asked for: of less it would shorten less.
        """
        job = self.job
        if job.budget is not None:
            what, only, seed = "", (), None
        words = ["python", "jobs/reproduce.py", what or job.what, job.preset]
        first = cli.describe(job).get("seed") if seed is None else seed
        for name, value in self.given.items():
            words += as_words(name, value)
        words += ["--seed", str(first)] if first is not None else []
        words += ["--seeds", str(job.seeds)] if job.seeds > 1 and seed is None else []
        words += ["--only", ",".join(only or self.only)] if only or self.only else []
        words += ["--budget", f"{job.budget:g}"] if job.budget is not None else []
        words += ["--launcher", job.launcher] if job.launcher != "ray" else []
        return shlex.join(words)

    def command_of(self, plan: Plan, unit: Unit) -> str:
        """What makes a unit again: jobs/train.py, or for a purifier in front of another target this job."""
        training = plan.trainings.get(unit.key)
        if training is None:
            return self.command("table2", (unit.system.name,), unit.seed)
        run = training.run
        return cli.command(cli.TrainJob(training.preset, run, launcher=self.job.launcher, defense=run.defense))


class Reproduction:
    """One call of jobs/reproduce.py."""

    def __init__(self, asked: Asked, terminal: Listening) -> None:
        """Raises ConfigError where the plan cannot be made."""
        self.asked, self.terminal, self.job = asked, terminal, asked.job
        self.config = with_absolute_paths(asked.job.run)
        self.commit = commit()
        self.tags = {"dircluster.commit": self.commit, "dircluster.command": asked.command()}
        """Of its run in MLflow, and of its trainings'."""
        self.record: Any = None
        self.held = contextlib.ExitStack()
        """What lasts as long as the record is RUNNING."""
        self.plan = asked.plan(1.0)
        words = {"what": self.job.what, "only": asked.only, "seeds": asked.seeds, "budget": self.job.budget}
        done = [self.plan.run_of(unit).identity for unit in self.plan.all]
        self.key = digest([words, done])[:12]
        """What tells this reproduction from others."""
        name = f"{self.config.name}-{self.job.what}-{self.key}"
        folder = open_path(self.config.storage.uri, self.config.storage) / "reproductions"
        self.store, self.budgets = Store(folder / name), Store(folder / "budgets")
        self.timed = False
        """Whether the plan is shown with minutes."""
        self.failed: dict[str, str] = {}
        """Why units failed, by their names."""

    def run(self) -> int:
        """Plan, train, judge, show; -> exit code. A system that fails leaves the others alone."""
        began, status = time.monotonic(), "FAILED"
        found = self._costed()
        self._show(found)
        if self.job.dry_run:
            cli.write_summary(self.job, {"factor": self.plan.factor, "plan": [cost.to_plain() for cost in found]})
            return 0
        self._open_record()
        try:
            units = Units(self.plan, self.job.launcher, self.terminal, self.record, self.tags)
            signal = units.run()
            ended = [(unit.name, units.outcomes[unit.key]) for unit in self.plan.all if unit.key in units.outcomes]
            self.failed = {name: outcome.error for name, outcome in ended if outcome.error}
            if not signal:
                self._tell(units, time.monotonic() - began)
            status = "KILLED" if signal else "FAILED" if self.failed else "FINISHED"
        except SystemExit:  # asked twice to stop
            status = "KILLED"
            raise
        finally:
            self.held.close()
            if self.record is not None:
                from dircluster.cluster.tracking.jobs import finish_job

                finish_job(self.record, status, self.terminal.say)
        if signal:
            again = cli.continued(self.asked.command(), self.job)
            self.terminal.say(f"stopped; what is finished is kept, and this goes on: {again}")
            return 128 + signal
        return 1 if self.failed else 0

    def _costed(self) -> list[Cost]:
        """Fit the plan to the budget; -> what is left of it, in seconds too where steps are timed, or were for it."""
        self.terminal.say("counting what each system takes")
        budget, paces = self.job.budget, None
        trained = [dict(training.stages) for training in self.plan.trainings.values()]
        budgeted = digest([budget, trained])[:24]
        kept = (self.store.get("factor") or self.budgets.get(budgeted)) if budget is not None else None
        if kept is not None:  # what goes on, or judges the same trainings otherwise, must not choose another
            self.plan = self.asked.plan(kept["factor"])
            paces = None if self.job.dry_run else self._paces(kept)
        if paces is not None:
            device = next(iter(paces.values())).device
            self.terminal.say(f"minutes are at the pace that the budget was shared out by, of {device}")
        elif self.job.dry_run or budget is not None:
            self.terminal.say("timing some steps of each system, to foretell what it takes")
            with local_workers(as_launched(self.config, self.job.launcher).scaling) as parallel:
                paces = calibrated(self.plan, parallel, TIMED, self.job.launcher)
        if budget is not None and paces is not None and kept is None:
            factor = factor_for(budget, self._costs(paces, judged_too=False))
            self.plan = self.asked.plan(factor)
            if not self.job.dry_run:
                plain = {name: to_plain(pace) for name, pace in paces.items()}
                self.budgets.put(budgeted, {"factor": factor, "paces": plain})
        self.timed = paces is not None
        stored, judged = self._stored()
        return self._costs(paces, stored, judged)

    def _paces(self, kept: Mapping[str, Any]) -> dict[str, Calibration] | None:
        """Those by which a factor was chosen; None where they are not all there, as of other code."""
        try:
            found = {name: from_plain(plain) for name, plain in kept["paces"].items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        known = {(name, stage) for name, pace in found.items() for stage in pace.paces}
        needed = {(each.preset, stage) for each in self.plan.trainings.values() for stage in (*each.stages, EVALUATION)}
        return found if needed <= known else None

    def _costs(
        self,
        paces: Mapping[str, Any] | None,
        stored: Collection[str] = (),
        judged: Collection[str] = (),
        *,
        judged_too: bool = True,
    ) -> list[Cost]:
        def sizes(run: RunConfig) -> tuple[int, int, int]:
            return split_sizes(run.data, opener(run.storage))

        return costs(self.plan, sizes, self.job.launcher, paces, stored, judged, judged_too=judged_too)

    def _stored(self) -> tuple[set[str], set[str]]:
        """Keys of finished stages, and, where it is foretold what judging takes, of what is judged."""
        data = self.config.data
        if self.job.dry_run and data.uri is None and not preflight.is_here(data.name, data_cache(self.config.storage)):
            self.terminal.say(f"what is stored is not looked at: it goes by the images of {data.name}, not fetched yet")
            return set(), set()
        try:
            found = find_stored(self.plan, self.config)
            judged = judged_units(self.plan, found, judged_trainings(self.plan)) if self.timed else set()
            return set(found.stages), judged
        except ConfigError:
            raise
        except Exception as error:  # whatever object storage raises: each training looks again
            self.terminal.say(f"what is stored cannot be seen: {named_line(error)}")
            return set(), set()

    def _show(self, found: list[Cost]) -> None:
        """The plan as a table: a row a training or transfer, seeds together, with minutes where they are known."""
        plan = self.plan
        whole = Cost(
            "in all",
            (),
            "",
            operations=sum(cost.operations for cost in found if not math.isnan(cost.operations)),
            seconds=sum(cost.seconds for cost in found),
            judging=sum(cost.judging for cost in found),
        )
        rows = [_row(cost, whole, self.timed) for cost in (*by_kind(found), whole)]
        shorter = "" if plan.factor == 1 else f", schedules times {plan.factor:g}"
        counted = f"{len(plan.trainings)} trainings, {len(plan.transfers)} transfers{shorter}"
        self.terminal.lines(f"{self.job.what} of {self.job.preset}: {counted}", rows)
        self.terminal.say("reuses: stages that storage holds finished, and in brackets those that a row above trains")
        self.terminal.say("GMAC: what is left to train, counted on its own steps (?: it cannot be); judging is on top")
        if self.timed:
            self.terminal.say("not foretold: storage, the start and end of each job")

    def _open_record(self) -> None:
        from dircluster.cluster.runtime import local

        if not self.config.tracking.enabled:
            return
        if self.job.launcher == "local" and not local.has_mlflow():
            self.terminal.say("MLflow is not installed: no record is kept")
            return
        from dircluster.cluster.tracking.jobs import open_job
        from dircluster.cluster.tracking.owners import beating

        made = {"space": f"reproduce-{self.job.what}", "varied": [], "seeds": self.job.seeds}
        made |= {"only": ",".join(self.asked.only), "factor": self.plan.factor, "key": self.key}
        self.record = open_job(self.config, self.tags, sweep=made)
        self.held.enter_context(beating(self.record.uri, self.record.run_id))
        self.terminal.say(f"MLflow    run {self.record.run_id}")

    def _tell(self, units: Units, seconds: float) -> None:
        """Tables on the terminal, the page and its data in storage and MLflow."""
        commands = {unit.key: self.asked.command_of(self.plan, unit) for unit in self.plan.all}
        commands |= {exhibit.name: self.asked.command(exhibit.name) for exhibit in self.plan.exhibits}
        folder = str(self.store.folder)
        result = Result(self.plan, units.outcomes, commands, self.job.preset, self.config, self.terminal, folder)
        facts = {"command": self.asked.command(), "commit": self.commit, "seeds": ", ".join(map(str, self.asked.seeds))}
        files = result.files(f"{self.job.what} on {self.job.preset}", facts)
        for section in result.sections:
            rows = [dict(zip(section.head, row, strict=True)) for row in section.grid]
            self.terminal.lines(section.exhibit.title, rows)
        self.store.add_files(files)
        for name in files:
            if not name.startswith("claims/"):
                self.terminal.say(f"kept      {self.store.folder / name}")
        if self.record is not None:
            from dircluster.cluster.tracking.tracker import MlflowTracker

            tracker = MlflowTracker(self.record, self.terminal.say)
            tracker.sweep(result.evidence, files, "")
            tracker.close()
        self.terminal.say(f"took      {seconds:.0f} s")
        cli.write_summary(self.job, {**result.plain, "folder": folder})


def _row(cost: Cost, whole: Cost, timed: bool) -> dict[str, str]:
    """A row of the plan; ``whole`` is that of all."""
    gmac, share = "?", "?"
    if not math.isnan(cost.operations):
        multiplied = cost.operations / 2e9
        gmac = f"{multiplied:,.0f}" if multiplied >= 10 else f"{multiplied:.2g}" if multiplied else ""
        share = f"{100 * cost.operations / whole.operations:.1f} %" if cost.operations else ""
    row = {
        "system": cost.kind,
        "seeds": ", ".join(map(str, cost.seeds)),
        "trains": ", ".join(cost.trained),
        "reuses": ", ".join([*cost.stored, *(f"({stage})" for stage in cost.shared)]),
        "suite": cost.suite,
        "GMAC": gmac,
        "share": share,
    }
    minutes = {"training, min": f"{cost.seconds / 60:.1f}", "judging, min": f"{cost.judging / 60:.1f}"}
    return row | minutes if timed else row
