"""The command line of a job: preset < --config FILE < --a.b VALUE, and errors of one line.

It imports neither torch nor ray, so that ``--help`` and a config error answer at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml

from dircluster.config import (
    LONGEST,
    ConfigError,
    RunConfig,
    SuiteName,
    flatten,
    is_own_code,
    real_path,
    to_dict,
    with_lengths_of,
    without_secrets,
)
from dircluster.files import check_file
from dircluster.presets import RUNS, preset, presets_of, search_folder
from dircluster.printing import reader_may_leave
from dircluster.settings_file import SWITCHED, Flags, as_words, flags_of, forms_of, words_of
from dircluster.torchrun import await_turn, check_group

Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class Job:
    """A command over one run. Settings come from the preset, then from --config, then from the flags.

    Numbers may be fractions (8/255).
    """

    preset: tyro.conf.Positional[str] = "digits"
    """digits, cifar10 (the paper), cifar10_fast, cifar10_small (no GPU), cifar10_joint (the released code), svhn,
    cifar100; NAME_smoke runs through in seconds. package.module:NAME is one of a defense of your own."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()
    """What is trained, and how."""
    config: Path | None = None
    """YAML file of settings."""
    summary: Path | None = None
    """Write the outcome to this JSON file."""
    print_config: Switch = False
    """Print all settings as YAML, and stop."""
    given: Annotated[frozenset[str], tyro.conf.Suppress] = frozenset()
    """Names of the settings that --config or a flag gave, whatever their values."""

    @property
    def given_settings(self) -> frozenset[str]:
        """The same as settings are called."""
        return frozenset(name.replace("-", "_") for name in self.given)


@dataclass(frozen=True)
class DefenseJob(Job):
    """A command that trains a defense."""

    defense: str = "dir"
    """dir, apegan, apegan_a, hgd, hgd_a, nrp, nrp_a, jatp, menet, ebm, identity or finetune, or package.module with a
    DEFENSE of your own, found in the current folder or installed. The preset is then looked up in its PRESETS."""


@dataclass(frozen=True)
class TrainJob(DefenseJob):
    """Train a defense and judge it: its target, its own stages, the evaluation.

    A stage whose settings and inputs are unchanged is reused, and the same command resumes what was interrupted.
    Settings come from the preset, then from --config, then from the flags; numbers may be fractions (8/255).
    """

    launcher: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers; local: this process, or the processes of torchrun."""
    fresh: Switch = False
    """Start again beside what is stored instead of reusing or resuming it."""
    dry_run: Switch = False
    """Say what would run and what it would take, from a minute or so of measuring, and stop. Where storage is a folder
    the --summary of the run that follows shows it beside what came."""
    export: Path | None = None
    """Write the finished defense into this folder as model hubs show it: model.safetensors, config.json, README.md."""
    calibration: Path | None = None
    """The --summary of an earlier --dry-run by as many workers, of this machine or another: what is measured there is
    not measured again, and foretells this run's."""


@dataclass(frozen=True)
class EvaluateJob(Job):
    """Judge a defense, whoever trained it. What is finished is kept: the same command goes on, or shows it again."""

    defense: str = ""
    """The folder of a checkpoint, its place in object storage, an MLflow URI (models:/dir-digits@champion), zoo:NAME
    (comes with this package), package.module:factory (called without arguments, returns a torch.nn.Module), or none
    (the bare --target.uri)."""
    suite: SuiteName | None = None
    """Short for --evaluation.suite."""
    verdict: Switch = False
    """Ask too whether the defense only hides gradients; paper and rigorous do so unless evaluation.verdict is given."""
    no_verdict: Switch = False
    """Leave that out of paper and rigorous."""
    launcher: Literal["ray", "local"] = "ray"
    """ray: as many workers as there are CPUs or GPUs, or --scaling.workers; local: this process, or torchrun's."""
    keep_images: Switch = False
    """Keep the adversarial images beside the report."""
    export: Path | None = None
    """Write all adversarial images to this .pt (tensors alone) or .npz, and RobustBench's claim beside it (.json)."""
    compare: Path | None = None
    """The report-*.json of another evaluation on the same test split: the report shows which images changed."""
    surrogate: str = ""
    """The model that transfers are crafted on (as --target.uri), instead of the defense's own target."""
    natural_target: str = ""
    """A naturally trained target (as --target.uri) to draw into Figure 2 beside the defense's own."""
    trust_code: Switch = False
    """Import code that is not this package's, where a checkpoint names some: its target's (package.module:factory) or
    its defense's (package.module)."""


@dataclass(frozen=True)
class TuneJob(DefenseJob):
    """Train a defense at every point of a space, on Ray, and say which is best on the held-out images.

    Stages that points have in common are trained once. What is finished is kept: the same command goes on.
    """

    space: Path | None = None
    """A file with GRID, the points, or SEARCH, the ranges, over names of settings; see tune_spaces. tune_alpha,
    tune_depth and tune_mask_ratio have theirs."""
    search: Switch = False
    """Let Optuna choose points from SEARCH instead of training all of GRID."""
    points: int = 20
    """Points that a search tries."""
    seeds: int = 1
    """Seeds at each point: --seed and those after it."""
    asha: Switch = False
    """Stop trials early whose held-out robust accuracy is behind (ASHA)."""
    max_concurrent: int | None = None
    """Trials at a time; as many as the cluster has CPUs or GPUs for when not given."""
    retries: int = 1
    """Times that a trial which failed goes on from its checkpoint before it counts as failed."""

    def __post_init__(self) -> None:
        for name, least in (("points", 1), ("seeds", 1), ("max_concurrent", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ReproduceJob(Job):
    """Make tables and figures of the DIR paper again: every system that they compare, by one recipe and suite.

    The first word says what: table1 to table5, ratio, fig2, fig4, fig5, fig6a, fig6b, fig7, no-pretrain, or all; the
    preset after it is digits, cifar10, svhn, cifar10_small (Table 1's systems alone), or NAME_smoke of one. What cells
    share is trained once, what is finished is kept, and the same command goes on. Settings are those of all systems,
    such as --evaluation.images 1000.
    """

    preset: tyro.conf.Positional[str] = "digits"
    """The second word: digits, cifar10, svhn, cifar10_small, or NAME_smoke of one."""
    what: str = ""
    """The table or figure, when it is not the first word."""
    only: str = ""
    """Systems, with commas between: hgd,dir; all that the table has when not given."""
    seeds: int = 1
    """Trainings of each system: --seed and those after it."""
    budget: float | None = None
    """Minutes that all trainings may take together, as foretold from some seconds of their own steps: the schedules of
    all systems are shortened by one factor, which stands in every cell. Judging comes on top."""
    launcher: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers; local: this process."""
    dry_run: Switch = False
    """Show what would be trained, what of it is shared, and what it would take, and stop."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, got {self.seeds}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ConfigError(f"--budget must be positive, got {self.budget:g}")


@dataclass(frozen=True)
class BenchmarkJob(DefenseJob):
    """Time the phases of a training step on real images: draws, attack, forward, backward, update."""

    steps: int = 5
    """Steps timed, after the first ones, which are not."""
    compare: Switch = False
    """Time whole steps in turns instead: the paper's step written plainly, the same here, and fast crafting."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps}")


@dataclass(frozen=True)
class DoctorJob(DefenseJob):
    """Tell whether this machine trains correctly and fast: one line a check, exit code 1 where one failed.

    Without a preset it is cifar10 where there is a GPU, else digits. It reads no data and keeps nothing but --summary.
    """

    summary: Path | None = None
    """Write the findings to this JSON file, and as a page beside it (.html)."""
    seconds: float | None = None
    """Seconds that all of it may take; 180 on a GPU and 60 on a CPU when not given."""

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds <= LONGEST:
            raise ConfigError(f"--seconds must be positive and at most {LONGEST:g}, got {self.seconds:g}")


AnyJob = TypeVar("AnyJob", bound=Job)


def parse(kind: type[AnyJob], argv: Sequence[str]) -> AnyJob:
    """The job that ``argv`` describes. Raises ConfigError; exits with 0 after --help."""
    words = list(argv)
    _refuse_nul(words)
    name = _take_preset(words)
    of_own = issubclass(kind, DefenseJob)
    defense = (value_of("--defense", words) or name.rpartition(":")[0]) if of_own else ""
    if ":" in name or defense not in ("", *RUNS):
        search_folder(os.getcwd())
    if defense and ":" in name:
        if not name.startswith(f"{defense}:"):
            raise ConfigError(f"preset {name} is of another defense than --defense {defense}")
        name = name.removeprefix(f"{defense}:")
    name = name or ("digits" if not defense else next(iter(presets_of(defense))))
    run = preset(name, defense)
    empty = [f"--{flag}".replace("_", "-") for flag, value in flatten(to_dict(run)).items() if value == ""]
    _refuse_empty(argv, empty)
    base = kind(name, run)
    if isinstance(base, DefenseJob):
        base = dataclasses.replace(base, defense=run.defense)
    file = value_of("--config", words)
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise ConfigError("--config is given twice: bring all settings into one file")
    if file:
        of_file = words_of(Path(file), Flags.of(kind, type(run)))
        _refuse_nul(of_file)
        _refuse_empty(of_file, empty)
        words = [*of_file, *words]
    with _one_line_errors():
        decimal = _with_decimals(kind, type(run), words)
        job = tyro.cli(kind, default=base, args=decimal, prog=_called(sys.argv))
    if job.config is not None and not file:
        raise ConfigError(f"--config {job.config} begins as a flag does: give ./{job.config}")
    if job.preset != name:
        _refuse_value_of_a_switch(job.preset, words, Flags.of(kind, type(run)).switches)
        raise ConfigError(f"the preset is the first word alone, got {job.preset!r} after it (the preset is {name})")
    if isinstance(job, DefenseJob) and job.defense != run.defense:
        raise ConfigError(f"--defense {job.defense} stands in the --config file: give it as a flag, once")
    flags = (word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    given = frozenset(flag[2:] for flag in flags)
    job = dataclasses.replace(job, given=given)
    return dataclasses.replace(job, run=with_lengths_of(job.run, run, job.given_settings))


def _called(words: Sequence[str]) -> str | None:
    """What --help calls the command that ``words`` are of: of the installed one its verb too, else as it was called."""
    installed = Path(words[0]).name in ("dircluster", "__main__.py")
    return f"dircluster {words[1]}" if installed and len(words) > 1 else None


def _refuse_value_of_a_switch(value: str, words: Sequence[str], switches: Container[str]) -> None:
    """Raise ConfigError where ``value`` says yes or no behind a flag that is on or off."""
    if value.lower() not in (*SWITCHED, "y", "n", "1", "0", "t", "f"):
        return
    for word, after in itertools.pairwise([*words, ""]):
        flag, _, given = word.replace("_", "-").partition("=")
        flag = flag.replace(".no-", ".")
        if value in (given, after) and flag in switches:
            raise ConfigError(f"{flag} takes no value, got {value!r}: it is {' or '.join(forms_of(flag))}")


def _refuse_nul(words: Sequence[str]) -> None:
    """Raise ConfigError where a word holds a NUL character, which YAML can write and no file may be called."""
    for word in words:
        if "\0" in word:
            raise ConfigError(f"{word!r} holds a NUL character")


def _refuse_empty(words: Sequence[str], may_be: Container[str]) -> None:
    """Raise ConfigError where a word is empty, as of a shell's variable that is not set, unless its flag ``may_be``."""
    for before, word in zip(["the preset", *words], words, strict=False):
        if not word.strip() or re.fullmatch(r"--[\w.-]+=\s*", word):
            flag = word.rstrip(" =") or before
            if flag.replace("_", "-") not in may_be:
                raise ConfigError(f"{flag} is empty: give a value, or leave it out")


SPINS = "3000"
"""How often a thread of OpenMP's looks for work before it sleeps, some ten microseconds. Its own choice is a hundred
times more: a step on two cores is then some 12 % faster on a quiet machine, and 5 times slower or worse beside one busy
process (docs/results.md)."""


def execute(
    kind: type[AnyJob],
    argv: Sequence[str],
    work: Callable[[AnyJob], int],
    settled: Callable[[AnyJob], AnyJob] = lambda job: job,
) -> int:
    """Parse, check and do ``work``; -> exit code. A ConfigError becomes one line on stderr, and code 2 or its own.

    ``settled`` gives a job the settings that follow from the rest of it, before they are printed or used.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read where PyTorch is imported, here and in workers
    try:
        with reader_may_leave():
            job = settled(parse(kind, argv))
            if job.print_config:
                print(to_yaml(job.run), end="")
                return 0
        check_group()
        if job.summary is not None:
            _check_summary(job.summary)
        return work(job)
    except ConfigError as error:
        say_error(str(error))
        return error.exit_code


def say_error(line: str) -> None:
    """Tell on stderr what a job fails by, under torchrun once, without the secrets that it may hold."""
    await_turn()
    print(f"error: {without_secrets(line)}", file=sys.stderr)


LEAST_COLUMNS = 20
"""Of help, which tyro lays out for ever in a single one."""


def _check_summary(file: Path) -> None:
    try:
        check_file(real_path(file))
    except OSError as error:
        raise ConfigError(f"--summary {file} cannot be written: {error.strerror}") from error


def write_summary(job: Job, outcome: dict[str, Any]) -> None:
    """Write ``outcome`` where --summary says, if it does. Raises ConfigError where that cannot be written."""
    if job.summary is not None:
        try:
            job.summary.write_text(json.dumps(outcome, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--summary {job.summary} cannot be written: {error.strerror}") from error


def to_yaml(run: RunConfig) -> str:
    """All settings, in a form that ``--config`` reads back."""
    text: str = yaml.safe_dump(to_dict(run), sort_keys=False)
    return text


def _take_preset(words: list[str]) -> str:
    """Remove the preset from ``words``: the first of them, unless it is a flag; empty where there is none."""
    return words.pop(0) if words and not words[0].startswith("-") else ""


def value_of(flag: str, words: Sequence[str]) -> str:
    """The value that ``words`` give last to ``flag``; empty where they give none."""
    pairs = zip(words, [*words, ""][1:], strict=True)
    found = [b if a == flag else a.partition("=")[2] for a, b in pairs if a.partition("=")[0] == flag]
    return found[-1] if found and not found[-1].startswith("-") else ""


def _with_decimals(kind: type, run: type, words: Sequence[str]) -> list[str]:
    """``words`` with fractions as decimals, but for the values of texts: a folder may be named 1/2."""
    texts, flag, made = {*flags_of(kind, str, Path), *flags_of(run, str, Path)}, "", []
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0].replace("_", "-")
        made.append(word if flag in texts else _as_decimal(word))
    return made


def _as_decimal(word: str) -> str:
    fraction = re.fullmatch(r"(--[\w.-]+=)?(\d+(?:\.\d*)?)/(\d+(?:\.\d*)?)", word)
    if fraction is None or float(fraction[3]) == 0:
        return word
    return f"{fraction[1] or ''}{float(fraction[2]) / float(fraction[3])!r}"


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn tyro's boxed message into a ConfigError of one line."""
    captured, width = io.StringIO(), os.environ.get("COLUMNS")
    narrow = (width or "").isdecimal() and 0 < int(width or "") < LEAST_COLUMNS
    os.environ["COLUMNS"] = str(LEAST_COLUMNS) if narrow else width or "100"
    try:
        with contextlib.redirect_stderr(captured):
            yield
    except SystemExit as ended:
        if ended.code in (0, None):
            raise
        raise ConfigError(_plain(captured.getvalue())) from None
    finally:
        del os.environ["COLUMNS"]
        os.environ |= {} if width is None else {"COLUMNS": width}


def _plain(boxed: str) -> str:
    """tyro's message without its box, drawn or in plain characters: what is wrong, and what may have been meant."""
    parts: list[list[str]] = [[]]
    for line in boxed.splitlines():
        words = line.strip("│ ")
        if words.startswith(("╭", "╰")) or re.fullmatch("[-─]{3,}", words):
            parts.append([])
        elif words:
            parts[-1].append(words)
    lines = [line for part in parts[1:] for line in part]
    message = list(parts[1]) if len(parts) > 1 else []
    if "Perhaps you meant:" in lines:
        found = lines.index("Perhaps you meant:")
        message += lines[found : found + 2]
    text = re.sub(r"^Error parsing [\w.]+: ", "", " ".join(message))
    return text or "the command line cannot be understood; see --help"


def describe(job: Job, run: RunConfig | None = None) -> dict[str, Any]:
    """The settings of a job, or of ``run``, that differ from its preset's, dotted."""
    defense = job.defense if isinstance(job, DefenseJob) else ""
    usual, chosen = flatten(to_dict(preset(job.preset, defense))), flatten(to_dict(run or job.run))
    return {name: value for name, value in chosen.items() if usual.get(name) != value}


def with_fewest_workers(job: AnyJob) -> AnyJob:
    """``job`` with the fewest workers of its preset, unless it was given others.

    So all trials and systems train on as many, and trials side by side do more than workers of one trial.
    """
    if "scaling.workers" in describe(job):
        return job
    scaling = dataclasses.replace(job.run.scaling, workers=job.run.scaling.least)
    return dataclasses.replace(job, run=dataclasses.replace(job.run, scaling=scaling))


OWN_FLAGS = ("launcher", "space", "search", "points", "seeds", "asha", "max_concurrent", "retries")
"""Fields of jobs beside their runs' settings that a command which continues them has too."""


def command(job: TrainJob | TuneJob, script: str = "train") -> str:
    """The command that continues this job, or shows its result again; or another script's with the same settings."""
    words, evaluates = ["python", f"jobs/{script}.py"], script == "evaluate"
    if job.defense in RUNS:
        words += [job.preset]
    elif evaluates:  # whose --defense is what it evaluates
        words += [f"{job.defense}:{job.preset}"]
    else:
        words += [*([job.preset] if job.preset else []), "--defense", job.defense]
    if evaluates and (job.defense not in RUNS or is_own_code(job.run.target)):
        words += ["--trust-code"]
    changed = describe(job)
    if {"attack.norm", "attack.epsilon"} & changed.keys():  # else lengths that keep the preset's value would follow
        changed |= {name: value for name, value in flatten(to_dict(job.run)).items() if name in job.run.lengths}
    for name, value in changed.items():
        words += as_words(name, value)
    for name in OWN_FLAGS:
        if (value := getattr(job, name, None)) != getattr(type(job), name, None):
            words += as_words(name, value)
    return shlex.join(words)


def continued(command: str, job: Job) -> str:
    """``command`` with the files that ``job`` was asked to write and has not, as it was stopped."""
    words = [as_words(name, file) for name in ("export", "summary") if (file := getattr(job, name, None)) is not None]
    return " ".join([command, *map(shlex.join, words)])
