"""One call behind jobs/tune*.py: train at every point of a space, and say what that showed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dircluster import cli
from dircluster.cluster.space import corners, fitted, load_space, mapped, told
from dircluster.cluster.version import commit
from dircluster.config import ConfigError, RunConfig, digest, flatten, to_dict, with_values

if TYPE_CHECKING:
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.mlflow_tracker import MlflowTracker
    from dircluster.cluster.ray_tune import Plan, Task
    from dircluster.cluster.space import Settings, Space
    from dircluster.evaluation.ablation import Point, Trial


def main(argv: Sequence[str], space: Path | None = None) -> int:
    """Run the sweep that ``argv`` describes, over the file ``space`` where one is given; -> exit code."""
    words = list(argv) if space is None else [*argv, "--space", str(space)]
    return cli.execute(cli.TuneJob, words, _tune)


def _tune(job: cli.TuneJob) -> int:
    if job.space is None:
        raise ConfigError("--space is missing: give a file such as tune_spaces/alpha.py")
    if job.asha and job.seeds > 1:
        raise ConfigError("--asha compares trials of one seed each: leave out --seeds, or --asha")
    space = fitted(load_space(job.space), job.run, job.search)

    from dircluster.cluster import storage
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.launch import with_absolute_paths, with_reachable_target

    def reachable(run: RunConfig) -> RunConfig:
        return with_reachable_target(with_absolute_paths(run))

    def held(settings: Settings) -> Settings:
        found = flatten(to_dict(reachable(with_values(job.run, settings))))
        return {name: found[name] for name in settings}

    storage.check(with_absolute_paths(job.run))
    with Terminal() as terminal:
        return _Sweep(job, reachable(job.run), mapped(space, held), terminal).run()


class _Sweep:
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
        self.began = self.training = time.monotonic()
        self.trained = 0
        self.plan: Plan
        self.tracker: MlflowTracker | None = None

    def run(self) -> int:
        """Train, show, keep; -> exit code. Raises ConfigError before anything was started."""
        import ray
        from botocore.exceptions import BotoCoreError
        from ray.tune import TuneError

        from dircluster.cluster.mlflow_tracker import finish_job
        from dircluster.cluster.ray_train import join_cluster

        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")  # a trial has many small actors, as meant
        signal, status, whole = 0, "FAILED", False
        try:
            join_cluster(self.config, self.terminal)
            self.plan = self._plan()
            trials = f"{self._expected()} trials, {self.plan.at_once} at a time"
            self.terminal.say(f"sweep {self.space.name} of {self.config.name}: {trials}")
            signal = self._prepare() or self._train()
            failed = any(trial.status == "FAILED" for trial in self.trials.values())
            status = "KILLED" if signal else "FAILED" if failed else "FINISHED"
            if not signal:
                self._tell()
                whole = True
        except (ray.exceptions.RayError, TuneError, OSError, BotoCoreError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"the sweep stopped ({reason}); the same command goes on") from error
        finally:
            ray.shutdown()
            if self.tracker is not None:
                self.tracker.close(hurry=not whole)
                finish_job(self.tracker.job, status)
        if signal:
            self.terminal.say("stopped; what is finished is kept, and the same command goes on")
            return 128 + signal
        return 1 if failed else 0

    def _plan(self) -> Plan:
        import ray

        from dircluster.cluster import nodes
        from dircluster.cluster.ray_tune import Plan

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
        tags = {"dircluster.commit": commit()}
        record = self._open_record(tags)
        config = dataclasses.replace(self.config, scaling=dataclasses.replace(scaling, threads=threads))
        return Plan(to_dict(config), record, self.seeds, tags, self.job.retries, at_once, self.job.asha)

    def _open_record(self, tags: dict[str, str]) -> dict[str, Any] | None:
        from dircluster.cluster.mlflow_tracker import MlflowTracker, open_job

        if not self.config.tracking.enabled:
            return None
        sweep = {"space": self.space.name, "varied": self.space.varied, "seeds": len(self.seeds), "key": self.key}
        record = open_job(self.config, tags, sweep=sweep)
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
        from dircluster.cluster.ray_tune import Tuning, result_of

        for until, tasks in shared_stages(self.plan, self.space):
            left = [task for task in tasks if result_of(self.plan.run_of(task), until) is None]
            if not left:
                continue
            self.terminal.say(f"training what trials share, until {until}: {len(left)} runs")
            signal = Tuning(self.plan, self.terminal, self._shared).tasks(left)
            if signal:
                return signal
        return 0

    def _shared(self, trial: Trial) -> None:
        """A stage that trials share is trained, or has failed, and then each of them will say so."""
        if trial.error:
            self.terminal.say(f"failed, though shared: {told(trial.settings)}, seed {trial.seed}: {trial.error}")

    def _train(self) -> int:
        """Train the trials; -> the signal that stopped it, or 0."""
        from dircluster.cluster.ray_tune import Task, Tuning

        self.training = time.monotonic()
        tuning = Tuning(self.plan, self.terminal, self._over, self._begun)
        if self.job.search:
            self.points = [
                point for place in sorted((self.folder / "points").glob("*.json")) if (point := _read(place))
            ]
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
        if signal or not self.job.search or len(self.points) >= self.job.points:
            return signal
        known = [
            (point.settings, statistics.fmean(scores))
            for point in self._by_point()
            if (scores := [trial.held_out for trial in point.trials if trial.held_out is not None])
        ]
        return tuning.search(self.space.ranges, known, len(self.points), self.job.points)

    def _known(self, task: Task) -> Trial | None:
        """How a trial ended that need not be trained."""
        from dircluster.cluster.ray_tune import result_of
        from dircluster.evaluation.ablation import Trial

        try:
            found = result_of(self.plan.run_of(task))
        except ConfigError as error:  # within a range there may be points that cannot be
            return Trial(task.settings, task.seed, "FAILED", error=str(error))
        if found is None and self.job.asha:
            plain = _read(self.folder / "stopped" / f"{_name(task.settings, task.seed)}.json")
            return None if plain is None else Trial(**plain)
        return found

    @property
    def key(self) -> str:
        """What tells this sweep from others."""
        return digest({**self.config.identity, "space": self.space.plain, "asha": self.job.asha})[:12]

    @property
    def folder(self) -> Path:
        """Where the sweep keeps its table and figure, the points that a search began, and what ASHA stopped."""
        from dircluster.cluster.storage import open_path

        name = f"{self.config.name}-{self.space.name}-{self.key}"
        return open_path(self.config.storage.uri, self.config.storage) / "sweeps" / name

    def _begun(self, settings: Settings) -> None:
        """A search chose a point: it is trained to its end, now or when the command is given again."""
        if settings in self.points:
            self.repeated += 1
        else:
            _write(self.folder / "points" / f"{len(self.points):06d}.json", settings)
            self.points.append(settings)

    def _over(self, trial: Trial) -> None:
        """A trial is over."""
        name = _name(trial.settings, trial.seed)
        if name in self.trials and self.trials[name].status == "FINISHED":  # beside a seed that was tried again
            return
        self.trained += 1
        self._note(trial)
        if trial.status == "STOPPED":
            _write(self.folder / "stopped" / f"{name}.json", dataclasses.asdict(trial))
        if trial.status == "FAILED":
            self.terminal.say(f"failed: {told(trial.settings)}, seed {trial.seed}: {trial.error}")
        self._show()

    def _note(self, trial: Trial) -> None:
        from dircluster.cluster.ray_tune import Task

        self.trials[_name(trial.settings, trial.seed)] = trial
        task = Task(trial.settings, trial.seed)
        if self.tracker is not None and (child := self.plan.child(task)) is not None:
            with contextlib.suppress(ConfigError):  # a point that cannot be
                self.tracker.trial(self.plan.run_of(task), self.plan.tags, child, trial)

    def _by_point(self) -> list[Point]:
        from dircluster.evaluation.ablation import by_point

        places = {digest(point): place for place, point in enumerate(self.points)}
        return sorted(by_point(self.trials.values()), key=lambda point: places[digest(point.settings)])

    def _lines(self) -> list[dict[str, str]]:
        from dircluster.evaluation.ablation import table
        from dircluster.evaluation.published import published_ablation

        def published(settings: Settings) -> tuple[float, float] | None:
            with contextlib.suppress(ConfigError):
                return published_ablation(with_values(self.config, settings))
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
        from dircluster.cluster import launch
        from dircluster.evaluation.ablation import best, figure

        points, rows, command = self._by_point(), self._lines(), ""
        files: dict[str, bytes] = {}
        if (winner := best(points)) is not None:
            run = with_values(self.job.run, winner.settings)
            command = launch.command(cli.TrainJob(self.job.preset, run))
            files = {"figure.png": figure(points), "best.yaml": cli.to_yaml(run).encode()}
            files["best.txt"] = f"{command}\n".encode()
            self.terminal.say(f"best      {told(winner.settings)} (by held-out robust accuracy): {command}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in {"table.json": json.dumps(rows, indent=1).encode(), **files}.items():
            (self.folder / name).write_bytes(content)
            self.terminal.say(f"kept      {self.folder / name}")
        if self.tracker is not None:
            self.tracker.sweep(rows, files, command)
        self.terminal.say(f"took      {time.monotonic() - self.began:.0f} s")
        trials = [dataclasses.asdict(trial) for point in points for trial in point.trials]
        cli.write_summary(self.job, {"trials": trials, "table": rows, "folder": str(self.folder)})


def _name(settings: Settings, seed: int) -> str:
    return digest([dict(settings), seed])[:24]


def _write(place: Path, plain: Settings) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(plain))


def _read(place: Path) -> dict[str, Any] | None:
    """What was written; None where it is not there or not whole."""
    try:
        found: dict[str, Any] = json.loads(place.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found


def shared_stages(plan: Plan, space: Space) -> list[tuple[str, list[Task]]]:
    """What to train before the trials, so that no two train the same: stages by name, and a run for each."""
    from dircluster.cluster.ray_tune import Task, key_of

    points = corners(space.ranges) or space.points
    enough = max(2, len(points) if space.ranges else 2)  # a search shares what none of its ranges changes
    targets: dict[str, dict[str, list[Task]]] = {}
    for task in (Task(point, seed) for point in points for seed in plan.seeds):
        run = plan.run_of(task)
        if not run.dir.joint:
            of_target = targets.setdefault(key_of(run, "target"), {})
            of_target.setdefault(key_of(run, "pretrain"), []).append(task)
    first = [
        next(iter(groups.values()))[0]
        for groups in targets.values()
        if len(groups) > 1 and sum(len(group) for group in groups.values()) >= enough
    ]
    then = [group[0] for groups in targets.values() for group in groups.values() if len(group) >= enough]
    return [
        (until, [dataclasses.replace(task, until=until) for task in tasks])
        for until, tasks in (("target", first), ("pretrain", then))
    ]
