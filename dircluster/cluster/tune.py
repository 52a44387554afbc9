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
from dircluster.cluster.space import corners, fitted, load_space, told
from dircluster.cluster.version import commit
from dircluster.config import ConfigError, RunConfig, digest, to_dict

if TYPE_CHECKING:
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.mlflow_tracker import JobRecord
    from dircluster.cluster.ray_tune import Plan, Task
    from dircluster.cluster.space import Settings, Space
    from dircluster.evaluation.ablation import Trial


def main(argv: Sequence[str], space: Path | None = None) -> int:
    """Run the sweep that ``argv`` describes, over the file ``space`` where one is given; -> exit code."""
    words = list(argv) if space is None else ["--space", str(space), *argv]
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

    config = with_absolute_paths(job.run)
    storage.check(config)
    config = with_reachable_target(config)
    with Terminal() as terminal:
        return _Sweep(job, config, space, terminal).run()


class _Sweep:
    """A sweep from the command line to its figure."""

    def __init__(self, job: cli.TuneJob, config: RunConfig, space: Space, terminal: Terminal) -> None:
        self.job, self.config, self.space, self.terminal = job, config, space, terminal
        self.seeds = tuple(range(config.seed, config.seed + job.seeds))
        self.trials: dict[str, Trial] = {}
        """What is over, by settings and seed."""
        self.began, self.trained = time.monotonic(), 0
        self.record: JobRecord | None = None
        self.tags = {"dircluster.commit": commit()}
        self.plan: Plan

    def run(self) -> int:
        """Train, show, keep; -> exit code. Raises ConfigError before anything was started."""
        import ray
        from botocore.exceptions import BotoCoreError
        from ray.tune import TuneError

        from dircluster.cluster.mlflow_tracker import finish_job
        from dircluster.cluster.ray_train import join_cluster

        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")  # a trial has many small actors, as meant
        signal, status = 0, "FAILED"
        try:
            join_cluster(self.config, self.terminal)
            self._open_record()
            self.plan = self._plan()
            trials = f"{self._expected()} trials, {self.plan.at_once} at a time"
            self.terminal.say(f"sweep {self.space.name} of {self.config.name}: {trials}")
            signal = self._prepare() or self._train()
            failed = [trial for trial in self.trials.values() if trial.status == "FAILED"]
            status = "KILLED" if signal else "FAILED" if failed else "FINISHED"
        except (ray.exceptions.RayError, TuneError, OSError, BotoCoreError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"the sweep stopped ({reason}); the same command goes on") from error
        finally:
            ray.shutdown()
            if self.record is not None:
                finish_job(self.record, status)
        if signal:
            self.terminal.say("stopped; what is finished is kept, and the same command goes on")
            return 128 + signal
        self._tell()
        return 1 if failed else 0

    def _open_record(self) -> None:
        from dircluster.cluster.mlflow_tracker import open_job

        if not self.config.tracking.enabled:
            return
        sweep = {"space": self.space.name, "varied": self.space.varied, "seeds": len(self.seeds), "key": self.key}
        self.record = open_job(self.config, self.tags, sweep=sweep)
        tracking = dataclasses.replace(self.config.tracking, uri=self.record.uri)  # trials have another environment
        self.config = dataclasses.replace(self.config, tracking=tracking)
        self.terminal.say(f"MLflow    run {self.record.run_id}")

    def _plan(self) -> Plan:
        import ray

        from dircluster.cluster import nodes
        from dircluster.cluster.ray_tune import Plan

        scaling, found = self.config.scaling, ray.cluster_resources()
        there = found.get("GPU", 0) if scaling.device == "gpu" else found.get("CPU", 0)
        if scaling.device == "auto" and found.get("GPU", 0) >= scaling.least:
            there = found["GPU"]
        room, wanted = int(there) // scaling.most, self.job.max_concurrent
        if wanted is not None and wanted > max(1, room) and not scaling.wait:
            raise ConfigError(
                f"--max-concurrent {wanted} trials of {scaling.most} workers do not fit: the cluster has {there:g}"
            )
        at_once = wanted or max(1, room)
        threads = scaling.threads or max(1, nodes.fewest_cores() // (at_once * scaling.most))
        config = dataclasses.replace(self.config, scaling=dataclasses.replace(scaling, threads=threads))
        return Plan(
            to_dict(config),
            None if self.record is None else dataclasses.asdict(self.record),
            self.seeds,
            self.tags,
            self.job.retries,
            at_once,
            self.job.asha,
        )

    def _expected(self) -> int:
        return (self.job.points if self.job.search else len(self.space.points)) * len(self.seeds)

    def _prepare(self) -> int:
        """Train once the stages that trials share; -> the signal that stopped it, or 0."""
        from dircluster.cluster.ray_tune import Tuning, kept

        for until, tasks in shared_stages(self.plan, self.space, self.job.search):
            left = [task for task in tasks if kept(self.plan.run_of(task), until) is None]
            if not left:
                continue
            self.terminal.say(f"training what trials share, until {until}: {len(left)} runs")
            signal = Tuning(self.plan, self._shared).tasks(left, self.terminal.stop_signal)
            if signal:
                return signal
        self.began = time.monotonic()
        return 0

    def _shared(self, trial: Trial, until: str) -> None:
        """A stage that trials share is trained, or has failed, and then each of them will say so."""
        if trial.error:
            self.terminal.say(f"failed until {until}: {told(trial.settings)}, seed {trial.seed}: {trial.error}")

    def _train(self) -> int:
        """Train the trials; -> the signal that stopped it, or 0."""
        from dircluster.cluster.ray_tune import Task, Tuning, kept

        tuning = Tuning(self.plan, self._over, self._begun)
        points = self._begun_points() if self.job.search else list(self.space.points)
        tasks = [Task(dict(point), seed) for point in points for seed in self.seeds]
        left = []
        for task in tasks:
            found = kept(self.plan.run_of(task)) or self._stopped(task)
            if found is None:
                left.append(task)
            else:
                self._note(dataclasses.replace(found, settings=task.settings))
        if self.trials:
            self._show()
        signal = tuning.tasks(left, self.terminal.stop_signal) if left else 0
        if signal or not self.job.search or len(points) >= self.job.points:
            return signal
        from dircluster.evaluation.ablation import by_point

        known = [
            (point.settings, statistics.fmean(scores))
            for point in by_point(self.trials.values())
            if (scores := [trial.held_out for trial in point.trials if trial.held_out is not None])
        ]
        return tuning.search(self.space.ranges, known, self.job.points - len(points), self.terminal.stop_signal)

    @property
    def key(self) -> str:
        """What tells this sweep from others."""
        wanted = dict(self.space.ranges) if self.job.search else list(self.space.points)
        return digest({**self.config.identity, "space": wanted, "asha": self.job.asha})[:12]

    @property
    def folder(self) -> Path:
        """Where the sweep keeps its table and figure, the points that a search began, and what ASHA stopped."""
        from dircluster.cluster.storage import open_path

        name = f"{self.config.name}-{self.space.name}-{self.key}"
        return open_path(self.config.storage.uri, self.config.storage) / "sweeps" / name

    def _begun(self, name: str, settings: Settings) -> None:
        """A search chose a point: it is trained to its end, now or when the command is given again."""
        with contextlib.suppress(ConfigError):  # within a range there may be points that cannot be
            cli.with_settings(self.config, settings)
            self._note_down("points", name, dict(settings))

    def _begun_points(self) -> list[Settings]:
        return [settings for place in sorted((self.folder / "points").glob("*.json")) if (settings := _read(place))]

    def _stopped(self, task: Task) -> Trial | None:
        from dircluster.evaluation.ablation import Trial

        found = _read(self.folder / "stopped" / f"{_name(task.settings, task.seed)}.json") if self.job.asha else None
        return None if found is None else Trial(**found)

    def _note_down(self, kind: str, name: str, plain: dict[str, Any]) -> None:
        place = self.folder / kind / f"{name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(plain))

    def _over(self, trial: Trial, until: str) -> None:
        """A trial is over."""
        self.trained += 1
        self._note(trial)
        if trial.status == "STOPPED":
            self._note_down("stopped", _name(trial.settings, trial.seed), dataclasses.asdict(trial))
        if trial.status == "FAILED":
            self.terminal.say(f"failed: {told(trial.settings)}, seed {trial.seed}: {trial.error}")
        self._show()

    def _note(self, trial: Trial) -> None:
        from dircluster.cluster.mlflow_tracker import record_trial
        from dircluster.cluster.ray_tune import Task

        self.trials[_name(trial.settings, trial.seed)] = trial
        task = Task(trial.settings, trial.seed)
        if (child := self.plan.child(task)) is not None:
            try:
                record_trial(child, self.plan.run_of(task), self.plan.tags, trial)
            except ConfigError as error:  # the result is in storage, whatever MLflow says
                self.terminal.say(str(error))

    def _lines(self) -> list[dict[str, str]]:
        from dircluster.evaluation.ablation import by_point, table

        return table(by_point(self.trials.values()), self.config.data.name)

    def _show(self) -> None:
        done, expected = len(self.trials), self._expected()
        title = f"{done} of {expected} trials"
        if self.trained and done < expected:
            left = (time.monotonic() - self.began) / self.trained * (expected - done)
            title += f", ETA {timedelta(seconds=round(left))}"
        self.terminal.lines(title, self._lines())

    def _tell(self) -> None:
        from dircluster.cluster import launch
        from dircluster.evaluation.ablation import best, by_point, figure

        points, files = by_point(self.trials.values()), {}
        winner = best(points)
        files["table.json"] = json.dumps(self._lines(), indent=1).encode()
        if winner is not None:
            run = cli.with_settings(self.job.run, winner.settings)
            command = launch.command(cli.TrainJob(self.job.preset, run))
            files |= {"figure.png": figure(points), "best.yaml": cli.to_yaml(run).encode()}
            files["best.txt"] = f"{command}\n".encode()
            self.terminal.say(f"best      {told(winner.settings)} (by held-out robust accuracy): {command}")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
            self.terminal.say(f"kept      {self.folder / name}")
        if self.record is not None:
            from dircluster.cluster.mlflow_tracker import log_sweep

            log_sweep(self.record, self._lines(), files, self.terminal.say)
        self.terminal.say(f"took      {time.monotonic() - self.began:.0f} s")
        trials = [dataclasses.asdict(trial) for trial in self.trials.values()]
        cli.write_summary(self.job, {"trials": trials, "table": self._lines(), "folder": str(self.folder)})


def _name(settings: Settings, seed: int) -> str:
    return digest([dict(settings), seed])[:24]


def _read(place: Path) -> dict[str, Any] | None:
    """What was noted down; None where it is not there or not whole."""
    try:
        found: dict[str, Any] = json.loads(place.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found


def shared_stages(plan: Plan, space: Space, search: bool) -> list[tuple[str, list[Task]]]:
    """What to train before the trials, so that no two train the same: stages by name, and a run for each."""
    from dircluster.cluster.ray_tune import Task
    from dircluster.training.stages import stage_settings

    points = corners(space.ranges) if search else space.points
    enough = max(2, len(points) if search else 2)  # a search shares what none of its ranges changes
    targets: dict[str, dict[str, list[Task]]] = {}
    for task in (Task(point, seed) for point in points for seed in plan.seeds):
        run = plan.run_of(task)
        if run.dir.joint:
            continue
        pretrain = stage_settings(run, "pretrain") if run.pretrain.epochs else {}
        given = [to_dict(run.data), run.target.uri]
        of_target = targets.setdefault(digest([stage_settings(run, "target"), given]), {})
        of_target.setdefault(digest(pretrain), []).append(task)
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
