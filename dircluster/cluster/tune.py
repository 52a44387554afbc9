"""One call behind jobs/tune*.py: train at every point of a space, and say what that showed."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from dircluster import cli
from dircluster.cluster.space import load_space, must_fit, told
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
    space = load_space(job.space)
    must_fit(space, job.run, job.search)

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
        self.tags: dict[str, str] = {}

    def run(self) -> int:
        """Train, show, keep; -> exit code. Raises ConfigError before anything was started."""
        import ray

        from dircluster.cluster.mlflow_tracker import finish_job
        from dircluster.cluster.ray_train import join_cluster

        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")  # a trial has many small actors, as meant
        signal, status = 0, "FAILED"
        try:
            join_cluster(self.config, self.terminal)
            self._open_record()
            plan = self._plan()
            self.terminal.say(
                f"sweep {self.space.name} of {self.config.name}: {self._expected()} trials, {plan.at_once} at a time"
            )
            signal = self._prepare(plan) or self._train(plan)
            failed = [trial for trial in self.trials.values() if trial.status == "FAILED"]
            status = "KILLED" if signal else "FAILED" if failed else "FINISHED"
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"the cluster is gone ({reason}); the same command goes on") from error
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
        from dircluster.cluster.version import commit

        if not self.config.tracking.enabled:
            return
        self.tags = {"dircluster.commit": commit()}
        sweep = {"space": self.space.name, "varied": self.space.varied, "seeds": len(self.seeds)}
        self.record = open_job(self.config, self.tags, sweep=sweep)
        self.terminal.say(f"MLflow    run {self.record.run_id}")

    def _plan(self) -> Plan:
        import ray

        from dircluster.cluster.ray_tune import Plan

        scaling, found = self.config.scaling, ray.cluster_resources()
        there = found.get("GPU", 0) if scaling.device == "gpu" else found.get("CPU", 0)
        if scaling.device == "auto" and found.get("GPU", 0) >= scaling.least:
            there = found["GPU"]
        return Plan(
            to_dict(self.config),
            None if self.record is None else dataclasses.asdict(self.record),
            self.seeds,
            self.tags,
            self.job.retries,
            self.job.max_concurrent or max(1, int(there) // scaling.most),
            self.job.asha,
        )

    def _expected(self) -> int:
        return (self.job.points if self.job.search else len(self.space.points)) * len(self.seeds)

    def _prepare(self, plan: Plan) -> int:
        """Train once the stages that trials share; -> the signal that stopped it, or 0."""
        from dircluster.cluster.ray_tune import Tuning, kept

        for until, tasks in shared_stages(plan, self.space, self.job.search):
            left = [task for task in tasks if kept(plan.run_of(task), until) is None]
            if not left:
                continue
            self.terminal.say(f"training what trials share, until {until}: {len(left)} runs")
            signal = Tuning(plan, _must_have_ended).tasks(left, self.terminal.stop_signal)
            if signal:
                return signal
        self.began = time.monotonic()
        return 0

    def _train(self, plan: Plan) -> int:
        """Train the trials; -> the signal that stopped it, or 0."""
        from dircluster.cluster.ray_tune import Task, Tuning, kept

        tuning = Tuning(plan, self._over, self._begun)
        points = self._begun_points() if self.job.search else list(self.space.points)
        tasks = [Task(dict(point), seed) for point in points for seed in self.seeds]
        left = []
        for task in tasks:
            found = kept(plan.run_of(task))
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
    def folder(self) -> Path:
        """Where the sweep keeps its table, its figure and the points that a search began."""
        from dircluster.cluster.storage import open_path

        key = digest({**self.config.identity, "space": [list(self.space.points), dict(self.space.ranges)]})
        name = f"{self.config.name}-{self.space.name}-{key[:12]}"
        return open_path(self.config.storage.uri, self.config.storage) / "sweeps" / name

    def _begun(self, settings: Settings) -> None:
        """A search chose a point: it is trained to its end, now or when the command is given again."""
        place = self.folder / "points" / f"{digest(dict(settings))[:16]}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(dict(settings)))

    def _begun_points(self) -> list[Settings]:
        return [json.loads(place.read_text()) for place in sorted((self.folder / "points").glob("*.json"))]

    def _over(self, trial: Trial, until: str) -> None:
        """A trial is over."""
        self.trained += 1
        self._note(trial)
        if trial.status == "FAILED":
            self.terminal.say(f"failed: {told(trial.settings)}, seed {trial.seed}: {trial.error}")
        self._show()

    def _note(self, trial: Trial) -> None:
        from dircluster.cluster.mlflow_tracker import record_trial

        self.trials[digest([dict(trial.settings), trial.seed])] = trial
        if self.record is not None:
            run = cli.with_settings(self.config, {**trial.settings, "seed": trial.seed})
            varied = {**trial.settings, **({"seed": trial.seed} if len(self.seeds) > 1 else {})}
            try:
                record_trial(self.record, run, self.tags, varied, trial)
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
        from dircluster.evaluation.ablation import best, by_point, figure

        points, files = by_point(self.trials.values()), {}
        winner = best(points)
        files["table.json"] = json.dumps(self._lines(), indent=1).encode()
        if winner is not None:
            run = cli.with_settings(self.job.run, winner.settings)
            words = [word for n, v in cli.describe(self.job, run).items() for word in cli.as_words(n, v)]
            command = " ".join(["python", "jobs/train.py", self.job.preset, *words])
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


def _must_have_ended(trial: Trial, until: str) -> None:
    if trial.error:
        raise ConfigError(f"what trials share, until {until}, cannot be trained: {trial.error}")


def shared_stages(plan: Plan, space: Space, search: bool) -> list[tuple[str, list[Task]]]:
    """What to train before the trials, so that no two train the same: stages by name, and a run for each."""
    from dircluster.cluster.ray_tune import Task
    from dircluster.training.stages import stage_settings

    corners = [{n: v} for n, values in space.ranges.items() for v in values]
    tasks = [Task(point, seed) for point in (corners if search else space.points) for seed in plan.seeds]
    runs = [(task, plan.run_of(task)) for task in tasks]
    if len(runs) < 2 or runs[0][1].dir.joint:
        return []
    targets: dict[str, dict[str, list[Task]]] = {}
    for task, run in runs:
        pretrain = stage_settings(run, "pretrain") if run.pretrain.epochs else {}
        of_target = targets.setdefault(digest(stage_settings(run, "target")), {})
        of_target.setdefault(digest(pretrain), []).append(task)
    first = [group[0] for groups in targets.values() if len(groups) > 1 for group in [*groups.values()][:1]]
    then = [group[0] for groups in targets.values() for group in groups.values() if len(group) > 1]
    return [
        (until, [dataclasses.replace(task, until=until) for task in tasks])
        for until, tasks in (("target", first), ("pretrain", then))
    ]
