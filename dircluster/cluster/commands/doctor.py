"""One call behind jobs/doctor.py: examine this machine, tell each finding as it is made, and keep them."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dircluster import cli, torchrun
from dircluster.config import ConfigError, real_path
from dircluster.files import check_file

if TYPE_CHECKING:
    from dircluster.doctor.findings import Finding


def main(argv: list[str]) -> int:
    """Examine this machine; -> exit code, 1 where a check failed. Errors of settings are one line on stderr."""
    return cli.execute(cli.DoctorJob, _with_preset(argv), _examine)


def _with_preset(argv: list[str]) -> list[str]:
    """``argv`` with a preset for its first word where it names neither one nor a defense: what this machine trains."""
    named = any(word.partition("=")[0] in ("-h", "--help", "--defense") for word in argv)
    if named or (argv and not argv[0].startswith("-")):
        return argv
    import torch

    return ["cifar10" if torch.cuda.is_available() else "digits", *argv]


def _examine(job: cli.DoctorJob) -> int:
    from dircluster.cluster.console import Terminal
    from dircluster.cluster.version import commit
    from dircluster.distributed.launch import local_workers
    from dircluster.doctor.checkup import ON_CPU, ON_GPU, checks
    from dircluster.doctor.findings import examine
    from dircluster.doctor.machine import Machine
    from dircluster.training.profiling import device_name

    torchrun.check_alone("the doctor is one process and starts others itself")
    if job.summary is not None and job.summary.suffix == ".html":
        raise ConfigError(f"--summary {job.summary} is the JSON file, the page lies beside it: give it another suffix")
    page = _page_of(job)
    if page is not None:
        with _as_one_line(page):
            check_file(real_path(page))
    began, version = time.monotonic(), commit()
    with local_workers(job.run.scaling) as parallel, Terminal() as terminal:
        machine = Machine(job.run, parallel)
        seconds = job.seconds or (ON_GPU if machine.gpu else ON_CPU)
        terminal.say(f"{job.run.name} on {device_name(machine.device)}, at most {seconds:.0f} s")
        terminal.say(_row("", "check", "figure", "bound", "seconds", "note"))
        found = examine(
            checks(machine, version, seconds),
            seconds,
            lambda finding: terminal.say(_line(finding)),
            terminal.stop_signal,
        )
        taken, signal = time.monotonic() - began, terminal.signal
        verdict = _verdict(found) if not signal else f"Stopped by signal {signal} after {len(found)} lines"
        terminal.say(f"{verdict} ({taken:.0f} s)")
        facts = {"preset": job.run.name, "device": device_name(machine.device), "commit": version}
    _keep(job, page, found, facts, verdict, taken)
    if signal:
        return 128 + signal
    return int(any(finding.status == "fail" for finding in found))


def _verdict(found: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in found)
    numbers = f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failed, {counts['skipped']} skipped"
    if counts["fail"]:
        return f"This machine does not train as it should: {numbers}"
    if not counts["ok"] + counts["warn"]:
        return f"Nothing was looked at: {numbers}"
    return f"{'No check failed, but some warn' if counts['warn'] else 'This machine trains as it should'}: {numbers}"


def _line(finding: Finding) -> str:
    from dircluster.doctor.page import figure_of

    return _row(finding.status, finding.name, figure_of(finding), finding.bound, f"{finding.seconds:.1f}", finding.note)


def _row(status: str, name: str, figure: str, bound: str, seconds: str, note: str) -> str:
    return f"{status:7}  {name:34}  {figure:>18}  {bound:>10}  {seconds:>7}  {note}".rstrip()


def _page_of(job: cli.DoctorJob) -> Path | None:
    """The page beside --summary; None without one, or where it is a pipe or a device: beside those lies nothing."""
    if job.summary is None or Path("/dev") in job.summary.absolute().parents:
        return None
    return job.summary.with_suffix(".html")


@contextlib.contextmanager
def _as_one_line(page: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{page}, the page beside --summary, cannot be written: {error.strerror}") from error


def _keep(
    job: cli.DoctorJob,
    page: Path | None,
    found: Sequence[Finding],
    facts: dict[str, str],
    verdict: str,
    seconds: float,
) -> None:
    """The findings where --summary says, and as a page beside it."""
    from dircluster.doctor.page import to_html

    rows = [finding.to_plain() for finding in found]
    cli.write_summary(job, {**facts, "verdict": verdict, "seconds": round(seconds, 1), "findings": rows})
    if page is not None:
        with _as_one_line(page):
            page.write_bytes(to_html(found, facts, verdict).encode())
