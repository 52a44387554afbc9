"""A sweep from the command line to its figure: what trials share first, then the trials, table and record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import time
from datetime import timedelta
from typing import Any

import ray
from ray.tune import TuneError

from dircluster import cli
from dircluster.cluster.console import Terminal
from dircluster.cluster.runtime import nodes
from dircluster.cluster.runtime.driver import join_cluster
from dircluster.cluster.storage import troubles
from dircluster.cluster.sweeps.space import Settings, Space, corners, settings_text
from dircluster.cluster.sweeps.store import Notes, files_of, key_of, name_of, result_of
from dircluster.cluster.sweeps.trial import Plan, Task
from dircluster.cluster.sweeps.tuner import Tuning
from dircluster.cluster.tracking.jobs import finish_job, open_job
from dircluster.cluster.tracking.owners import beating
from dircluster.cluster.tracking.tracker import MlflowTracker
from dircluster.cluster.version import commit
from dircluster.config import ConfigError, RunConfig, StoppedError, digest, first_line, varied, with_values
from dircluster.evaluation.sweep_table import Point, Trial, best, by_point, figure, table
from dircluster.presets import run_to_plain
from dircluster.training.stages import stages_of


class Sweep:
    """A sweep from the command line to its figure."""

    def __init__(self, job: cli.TuneJob, config: RunConfig, space: Space, terminal: Terminal) -> None:
        self.job, self.config, self.space, self.terminal = job, config, space, terminal
        self.seeds = tuple(range(config.seed, config.seed + job.seeds))
        self.points: list[Settings] = [] if job.search else list(space.points)
        """Those of the grid, or those that the search has begun."""
        self.repeated = 0
        """Points that the search chose again."""
        self.trials: dict[str, Trial] = {}
        """What is over, by settings and seed."""
        self.unshared: dict[str, str] = {}
        """Why stages that trials share could not be trained, by their keys."""
        self.began = self.training = time.monotonic()
        self.trained = 0
        self.plan: Plan
        self.tracker: MlflowTracker | None = None
        self.held = contextlib.ExitStack()
        """What lasts as long as the record is RUNNING."""
        files = files_of(*(with_values(config, point) for point in corners(space.ranges) or space.points))
        decides = {**config.identity, **files, "space": space.plain, "asha": job.asha}
        self.key = digest(decides)[:12]
        """What tells this sweep from others."""
        self.notes = Notes(config, space.name, self.key)

    def run(self) -> int:
        """Train, show, keep; -> exit code. Raises ConfigError before anything was started, StoppedError after."""
        signal, status, whole = 0, "FAILED", False
        try:
            join_cluster(self.config, self.terminal)
            signal = self.terminal.stop_signal() or self._work()
            failed = any(trial.status == "FAILED" for trial in self.trials.values())
            if not signal:
                self._tell()
                whole = True
            status = "KILLED" if signal else "FAILED" if failed else "FINISHED"
        except (ray.exceptions.RayError, TuneError, *troubles()) as error:
            raise StoppedError.of("sweep", first_line(error)) from error
        except SystemExit:  # asked twice to stop
            status = "KILLED"
            raise
        finally:
            ray.shutdown()
            self.held.close()
            if self.tracker is not None:
                self.tracker.close(hurry=not whole)
                finish_job(self.tracker.job, status, self.terminal.say)
        if signal:
            self.terminal.say("stopped; what is finished is kept, and the same command goes on")
            return 128 + signal
        return 1 if failed else 0

    def _work(self) -> int:
        """Plan and train; -> the signal that stopped it, or 0."""
        self.plan = self._plan()
        trials = f"{self._expected()} trials, {self.plan.at_once} at a time"
        self.terminal.say(f"sweep {self.space.name} of {self.config.name}: {trials}")
        return self._prepare() or self._train()

    def _plan(self) -> Plan:
        scaling, found, wanted = self.config.scaling, ray.cluster_resources(), self.job.max_concurrent
        on_gpu = scaling.device == "gpu" or (scaling.device == "auto" and found.get("GPU", 0) >= scaling.least)
        kind = "GPU" if on_gpu else "CPU"
        room = int(found.get(kind, 0)) // scaling.most
        if wanted is not None and wanted > max(1, room) and not scaling.wait:
            raise ConfigError(
                f"--max-concurrent {wanted} trials of {scaling.most} workers do not fit: the cluster has"
                f" {found.get(kind, 0):g} {kind}s"
            )
        at_once = wanted or max(1, room)
        threads = scaling.threads or nodes.cores_each(at_once * scaling.most, kind)
        tags = {"dircluster.commit": commit(), "dircluster.command": cli.command(self.job, "tune")}
        record = self._open_record(tags)
        scaling = dataclasses.replace(scaling, threads=threads, device="gpu" if on_gpu else "cpu")  # of all trials
        config = dataclasses.replace(self.config, scaling=scaling)
        given = self.job.given_settings
        return Plan(run_to_plain(config), record, self.seeds, tags, self.job.retries, at_once, self.job.asha, given)

    def _open_record(self, tags: dict[str, str]) -> dict[str, Any] | None:
        if not self.config.tracking.enabled:
            return None
        sweep = {"space": self.space.name, "varied": self.space.varied, "seeds": len(self.seeds), "key": self.key}
        record = open_job(self.config, tags, sweep=sweep)
        self.held.enter_context(beating(record.uri, record.run_id))
        self.tracker = MlflowTracker(record, self.terminal.say)
        tracking = dataclasses.replace(self.config.tracking, uri=record.uri)  # trials have another environment
        self.config = dataclasses.replace(self.config, tracking=tracking)
        self.terminal.say(f"MLflow    run {record.run_id}")
        return dataclasses.asdict(record)

    def _expected(self) -> int:
        points = max(self.job.points - self.repeated, len(self.points)) if self.job.search else len(self.points)
        return points * len(self.seeds)

    def _prepare(self) -> int:
        """Train once the stages that trials share; -> the signal that stopped it, or 0."""
        for until, tasks in shared_stages(self.plan, self.space):
            left = [t for t in tasks if result_of(self.plan.run_of(t), until) is None and not self._missing(t)]
            if not left:
                continue
            self.terminal.say(f"training what trials share, until {until}: {len(left)} runs")
            signal = Tuning(self.plan, self.terminal, functools.partial(self._shared, until)).tasks(left)
            if signal:
                return signal
        return 0

    def _shared(self, until: str, trial: Trial) -> None:
        """A stage that trials share is trained, or has failed, and with it the trials that need it."""
        if trial.error:
            self.terminal.say(
                f"failed, though shared: {settings_text(trial.settings)}, seed {trial.seed}: {trial.error}"
            )
            self.unshared[key_of(self.plan.run_of(Task(trial.settings, trial.seed)), until)] = trial.error

    def _missing(self, task: Task) -> str:
        """Why a stage that a task shares could not be trained; empty where it could, or where it shares none."""
        run = self.plan.run_of(task)
        found = (self.unshared.get(key_of(run, stage.name)) for stage in stages_of(run)[:-1])
        return next((reason for reason in found if reason), "")

    def _train(self) -> int:
        """Train the trials; -> the signal that stopped it, or 0."""
        self.training = time.monotonic()
        tuning = Tuning(self.plan, self.terminal, self._over, self._begun)
        if self.job.search:
            self.points, self.repeated = self.notes.points(), self.notes.repeated
        left = []
        for task in [Task(point, seed) for point in self.points for seed in self.seeds]:
            found = self._known(task)
            if found is None:
                left.append(task)
            else:
                self._note(dataclasses.replace(found, settings=task.settings))
        if self.trials:
            self._show()
        signal = tuning.tasks(left) if left else 0
        chosen = len(self.points) + self.repeated
        if signal or not self.job.search or chosen >= self.job.points:
            return signal
        reasons = [self._missing(Task(corners(self.space.ranges)[0], seed)) for seed in self.seeds]
        if all(reasons):
            raise ConfigError(f"what all points share could not be trained: {reasons[0]}")
        known = [
            (point.settings, statistics.fmean(scores))
            for point in self._by_point()
            if (scores := [trial.held_out for trial in point.trials if trial.held_out is not None])
        ]
        return tuning.search(self.space.ranges, known, chosen, self.job.points)

    def _known(self, task: Task) -> Trial | None:
        """How a trial ended that need not be trained."""
        try:
            run = self.plan.run_of(task)
        except ConfigError as error:  # within a range there may be points that cannot be
            return Trial(task.settings, task.seed, "FAILED", error=str(error))
        if (found := result_of(run)) is not None:
            return found
        if reason := self._missing(task):
            return Trial(task.settings, task.seed, "FAILED", error=reason)
        return self.notes.stopped(task.settings, task.seed) if self.job.asha else None

    def _begun(self, settings: Settings) -> None:
        """A search chose a point: it is trained to its end, now or when the command is given again."""
        if settings in self.points:
            self.repeated += 1
            self.notes.repeated = self.repeated
        else:
            self.notes.add_point(len(self.points), settings)
            self.points.append(settings)

    def _over(self, trial: Trial) -> None:
        """A trial is over."""
        name = name_of(trial.settings, trial.seed)
        if name in self.trials and self.trials[name].status == "FINISHED":  # of a point that was chosen again
            return
        self.trained += 1
        self._note(trial)
        if trial.status == "STOPPED":
            self.notes.add_stopped(trial)
        if trial.status == "FAILED":
            self.terminal.say(f"failed: {settings_text(trial.settings)}, seed {trial.seed}: {trial.error}")
        self._show()

    def _note(self, trial: Trial) -> None:
        self.trials[name_of(trial.settings, trial.seed)] = trial
        task = Task(trial.settings, trial.seed)
        if self.tracker is not None and (child := self.plan.child(task)) is not None:
            with contextlib.suppress(ConfigError):  # a point that cannot be
                self.tracker.trial(self.plan.run_of(task), self.plan.tags, child, trial)

    def _by_point(self) -> list[Point]:
        indices = {digest(point): index for index, point in enumerate(self.points)}
        return sorted(by_point(self.trials.values()), key=lambda point: indices[digest(point.settings)])

    def _lines(self) -> list[dict[str, str]]:
        def published(settings: Settings) -> tuple[float, float] | None:
            with contextlib.suppress(ConfigError):
                return varied(self.config, settings, self.job.given_settings).printed_ablation()
            return None

        return table(self._by_point(), published)

    def _show(self) -> None:
        done, expected = len(self.trials), self._expected()
        title = f"{done} of {expected} trials"
        if self.trained and done < expected:
            left = (time.monotonic() - self.training) / self.trained * (expected - done)
            title += f", ETA {timedelta(seconds=round(left))}"
        self.terminal.lines(title, self._lines())

    def _tell(self) -> None:
        points, rows, command = self._by_point(), self._lines(), ""
        files: dict[str, bytes] = {}
        if any(point.spread("robust") is not None for point in points):
            files["figure.png"] = figure(points)
        if (winner := best(points)) is None:
            self.terminal.say("best      none: nothing that has finished has a robust accuracy on held-out images")
        else:
            run = varied(self.job.run, winner.settings, self.job.given_settings)
            command = cli.command(cli.TrainJob(self.job.preset, run, defense=self.job.defense))
            files |= {"best.yaml": cli.to_yaml(run).encode(), "best.txt": f"{command}\n".encode()}
            self.terminal.say(f"best      {settings_text(winner.settings)} (by held-out robust accuracy): {command}")
        kept = {"table.json": json.dumps(rows, indent=1).encode(), **files}
        self.notes.add_files(kept)
        for name in kept:
            self.terminal.say(f"kept      {self.notes.folder / name}")
        if self.tracker is not None:
            self.tracker.sweep(rows, files, command)
        self.terminal.say(f"took      {time.monotonic() - self.began:.0f} s")
        trials = [dataclasses.asdict(trial) for point in points for trial in point.trials]
        cli.write_summary(self.job, {"trials": trials, "table": rows, "folder": str(self.notes.folder)})


def shared_stages(plan: Plan, space: Space) -> list[tuple[str, list[Task]]]:
    """What to train before the trials, so that no two train the same: stages by name, and a run for each."""
    points = corners(space.ranges) or space.points
    enough = max(2, len(points) if space.ranges else 2)  # a search shares what none of its ranges changes
    shared: dict[str, dict[str, list[Task]]] = {}  # by stage, then by what decides it
    then: dict[str, set[str]] = {}  # what decides the stage after it
    for task in (Task(point, seed) for point in points for seed in plan.seeds):
        run = plan.run_of(task)
        keys = {stage.name: key_of(run, stage.name) for stage in stages_of(run)[:-1]}
        for (name, key), after in zip(keys.items(), [*list(keys.values())[1:], ""], strict=True):
            shared.setdefault(name, {}).setdefault(key, []).append(task)
            then.setdefault(key, set()).add(after)
    return [
        (
            name,
            [
                dataclasses.replace(group[0], until=name)
                for key, group in groups.items()
                if len(group) >= enough and (then[key] == {""} or len(then[key]) > 1)
            ],
        )
        for name, groups in shared.items()
    ]
