"""One call behind jobs/train.py: check, record, run by Ray or here, tell the person what came out."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from dircluster import cli
from dircluster.config import ConfigError, RunConfig


def main(argv: list[str]) -> int:
    """Run the job that ``argv`` describes; -> the process's exit code. Errors are one line on stderr."""
    try:
        job = cli.parse(argv)
        if job.print_config:
            print(cli.to_yaml(job.run), end="")
            return 0
        if job.dry_run:
            from dircluster.cluster.plan import plan

            print(plan(job))
            return 0
        return _train(job)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def commit() -> str:
    """The version of this code: a git commit, with + where files differ from it; unknown outside a checkout."""
    here = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        sha = git("rev-parse", "HEAD")
        return (sha + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")) or "unknown"
    except OSError:
        return "unknown"


def _train(job: cli.Job) -> int:
    began = time.monotonic()
    from dircluster.cluster.console import Bystander, Terminal
    from dircluster.training.pipeline import check_storage

    told = job
    first = os.environ.get("RANK", "0") == "0" or job.launcher == "ray"
    job = dataclasses.replace(job, run=_with_absolute_paths(job.run))
    config, version = job.run, commit()
    check_storage(config)
    if job.summary is not None and not job.summary.resolve().parent.is_dir():
        raise ConfigError(f"--summary {job.summary}: the folder {job.summary.resolve().parent} does not exist")
    with Terminal() if first else Bystander() as terminal:
        changed = ", ".join(f"{name} {value}" for name, value in cli.describe(told).items()) or "as it is"
        manner = "fresh, beside what is stored" if job.fresh else "reusing and resuming what is stored"
        terminal.say(f"{config.name} ({changed}), seed {config.seed}, {manner} in {told.run.storage.uri}")
        token = _token(job)
        outcome, record = _run(job, version, token, terminal, first)
    seconds = time.monotonic() - began
    if first:
        _tell(job, outcome, record, version, seconds, terminal)
    if outcome["status"] == "FINISHED":
        return 0
    if outcome["status"] == "KILLED":
        return 128 + int(outcome["signal"])
    print(f"error: {outcome['error']}", file=sys.stderr)
    return int(outcome["exit"])


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers live in other folders: what names a file here must name it there."""

    def absolute(uri: str | None) -> str | None:
        return uri if uri is None or ":" in uri else str(Path(uri).expanduser().resolve())

    storage = dataclasses.replace(config.storage, uri=absolute(config.storage.uri.removeprefix("file://")) or "")
    data = dataclasses.replace(config.data, uri=absolute(config.data.uri))
    target = dataclasses.replace(config.target, uri=absolute(config.target.uri))
    return dataclasses.replace(config, storage=storage, data=data, target=target)


def _token(job: cli.Job) -> str | None:
    """What marks this job's folders as its own when it starts anew; the same in all of its processes."""
    if not job.fresh:
        return None
    return os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("MASTER_PORT", "") or uuid.uuid4().hex


def _run(job: cli.Job, version: str, token: str | None, terminal: Any, first: bool) -> tuple[dict[str, Any], Any]:
    from dircluster.cluster import local

    config = job.run
    record = None
    if config.tracking.enabled and first:
        if job.launcher == "ray" or local.has_mlflow():
            from dircluster.cluster.mlflow_tracker import open_job

            tags = {
                "dircluster.commit": version,
                "dircluster.launcher": job.launcher,
                "dircluster.workers": str(config.scaling.workers),
                "dircluster.command": resume_command(job),
            }
            record = open_job(config, tags, fresh=job.fresh)
        else:
            terminal.say("MLflow is not installed: no record is kept")
    status = "FAILED"
    try:
        if job.launcher == "ray":
            from dircluster.cluster import ray_train

            outcome = ray_train.train(config, token, record, terminal)
        else:
            outcome = local.train(config, token, record, terminal)
        status = outcome["status"]
        if status == "FINISHED" and record is not None:
            outcome["model"] = _register(job, outcome, record, terminal)
        return outcome, record
    finally:
        if record is not None:
            from dircluster.cluster.mlflow_tracker import finish_job

            finish_job(record, status)


def _register(job: cli.Job, outcome: dict[str, Any], record: Any, terminal: Any) -> str | None:
    from dircluster.cluster.mlflow_tracker import log_dataset, log_files
    from dircluster.cluster.registry import register
    from dircluster.evaluation.report import model_card

    folder = Path(outcome["checkpoint"])
    source = job.run.data.uri or job.run.data.name
    try:
        log_dataset(record, job.run.data.name, outcome["data"], source)
        log_files(record, {"model_card.md": model_card(job.run, outcome, commit()), "config.yaml": cli.to_yaml(job.run)})
        return register(record, job.run, folder)
    except Exception as error:  # the defence is in its folder whatever MLflow says
        terminal.say(f"MLflow could not register the model: {str(error).splitlines()[0]}; it is in {folder}")
        return None


def resume_command(job: cli.Job) -> str:
    """The command that continues this job, or shows its result again."""
    words = ["python", "jobs/train.py", job.preset]
    for name, value in cli.describe(job).items():
        words += cli.as_words(name, value)
    if job.launcher != "ray":
        words += ["--launcher", job.launcher]
    return " ".join(words)


def _tell(
    job: cli.Job, outcome: dict[str, Any], record: Any, version: str, seconds: float, terminal: Any
) -> None:
    if outcome["status"] == "FINISHED":
        terminal.table(outcome["results"])
        terminal.say(f"defense   {outcome['checkpoint']}")
        if outcome.get("model"):
            terminal.say(f"model     {outcome['model']}")
    if record is not None:
        shown = record.uri
        look = f"make ui, or: mlflow ui --backend-store-uri {shown}" if shown.startswith("sqlite") else shown
        terminal.say(f"MLflow    {look}  (run {record.run_id})")
    command = resume_command(job)
    if outcome["status"] == "FINISHED":
        terminal.say(f"judge it  python jobs/evaluate.py {outcome['checkpoint']}")
        terminal.say(f"took      {seconds:.0f} s")
    elif outcome["status"] == "KILLED":
        terminal.say(f"stopped by signal {outcome['signal']}; resume with: {command}")
    if job.summary is not None:
        _write_summary(job, outcome, record, version, seconds)


def _write_summary(job: cli.Job, outcome: dict[str, Any], record: Any, version: str, seconds: float) -> None:
    assert job.summary is not None
    summary = {
        "status": outcome["status"],
        "preset": job.preset,
        "name": job.run.name,
        "seed": job.run.seed,
        "changed": cli.describe(job),
        "commit": version,
        "seconds": round(seconds, 1),
        "run_id": None if record is None else record.run_id,
        "model": outcome.get("model"),
        "checkpoint": outcome.get("checkpoint"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "selection": outcome.get("selection", {}),
        "results": outcome.get("results", []),
    }
    if "error" in outcome:
        summary["error"] = outcome["error"]
    try:
        job.summary.write_text(json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--summary {job.summary} cannot be written: {error.strerror}") from error
