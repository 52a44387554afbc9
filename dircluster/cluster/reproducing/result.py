"""From the ends of units to the page: what is timed, what is drawn, notes, and files."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from dircluster.cluster.console import Terminal
from dircluster.cluster.loading import load_data
from dircluster.cluster.outcome import reason_of
from dircluster.cluster.storage import open_path, opener
from dircluster.config import ConfigError, RunConfig
from dircluster.data.layout import split_sizes
from dircluster.distributed.launch import local_workers
from dircluster.distributed.parallel import Parallel
from dircluster.evaluation.claims import Claim, problem_of
from dircluster.evaluation.leaderboard import as_markdown, as_page, by_threat
from dircluster.presets import preset
from dircluster.presets.base import as_one_of
from dircluster.reproduction.cells import Outcome, cells_of
from dircluster.reproduction.costs import TIMED, epoch_seconds, own_seconds
from dircluster.reproduction.exhibits import MEASURED, Exhibit, Line
from dircluster.reproduction.page import Section, of_schedules, to_html, to_markdown
from dircluster.reproduction.pictures import PICTURES, Scene, swept
from dircluster.reproduction.plan import Plan, Unit
from dircluster.reproduction.tables import CONTROLS
from dircluster.reproduction.versions import Versions, several, versions_of
from dircluster.training.export import load_defense_folder
from dircluster.training.forecast import Calibration, calibrate
from dircluster.training.stages import stages_of

OF_THE_PAPER = ("cifar10", "svhn")
"""Presets from whose numbers printed ones may be subtracted, and the names of their data."""
READING = (
    "Ours: mean over seeds, with the standard deviation (n - 1) where there are several. The interval (95 %, Wilson) is"
    " that of the mean as a share of n test images, which are the same for all seeds.",
    "Strongest: the attack that leaves the defense least, of all in its suite, transfers too, draws known or fresh with"
    " EOT. Votes, averaged logits, Wor.Rob and restored images do not count: they are other defenses or threats.",
    "Over None: points above the bare target under the same attack, of the strongest under the strongest that both met,"
    " ours and the paper's; ours over the seeds at which both ended.",
    "A number with ! is no evidence: its attack was weak, or the defense has collapsed; the column how says by what.",
)
REPLAYS = (
    "A number again, from the weights that it is of: the commands under each table of the HTML page, or the cell's"
    " `replays` in reproduction.json. They read the claims that lie beside it."
)
Clock = Callable[[Exhibit, Line, Parallel], float | None]
"""A line -> what it takes in the unit of a column of MEASURED."""


class Result:
    """What came out of a plan."""

    def __init__(
        self,
        plan: Plan,
        outcomes: Mapping[str, Outcome],
        commands: Mapping[str, str],
        preset: str,
        config: RunConfig,
        terminal: Terminal,
        folder: str,
    ) -> None:
        """``outcomes`` by units' keys, ``commands`` by them and by exhibits' names; ``folder`` will hold the files."""
        self.plan, self.preset, self.config, self.terminal = plan, preset, config, terminal
        self.commands = commands
        files = {unit.key: f"{folder}/{_claim_file(unit)}" for unit in plan.all}
        self.outcomes = {
            key: replace(end, commands=(commands[key],), claim_file=files[key] if end.claim else "")
            for key, end in outcomes.items()
        }
        self._paces: dict[str, Calibration] = {}
        self._time([exhibit for exhibit in plan.exhibits if set(exhibit.columns) & set(MEASURED)])

    def _time(self, exhibits: Sequence[Exhibit]) -> None:
        """Time steps of one worker, here and now, at the first seed: what was trained may be of another hour.

        What cannot be timed costs no accuracy and no other line: the reason is its cell's.
        """
        if not exhibits:
            return
        self.terminal.say(f"timing steps for {' and '.join(exhibit.name for exhibit in exhibits)}")
        clocks = {"ms an epoch": self._epoch, "training time": self._training_time}
        with ExitStack() as stack:
            parallel: Parallel | Exception
            try:
                parallel = stack.enter_context(local_workers(self.config.scaling))
            except Exception as error:  # such as a GPU that the workers have, and this process has not
                parallel = error
            for exhibit in exhibits:
                for line in exhibit.lines:
                    for column in (name for name in exhibit.columns if name in clocks):
                        self._time_line(exhibit, line, column, clocks[column], parallel)

    def _time_line(
        self, exhibit: Exhibit, line: Line, column: str, clock: Clock, parallel: Parallel | Exception
    ) -> None:
        key = self.plan.units(exhibit, line)[0].key
        ended = self.outcomes[key]
        if ended.error:
            return
        try:
            if isinstance(parallel, Exception):
                raise parallel
            value = clock(exhibit, line, parallel)
        except Exception as error:  # whatever a line raises is its own
            reason = reason_of(error)
            self.terminal.say(f"{exhibit.name}: {line.label} cannot be timed: {reason}")
            untimed = {**ended.untimed, column: f"cannot be timed: {reason}"}
            self.outcomes[key] = replace(ended, untimed=untimed)
            return
        if value is not None:
            self.outcomes[key] = replace(ended, measured={**ended.measured, column: value})

    def _epoch(self, exhibit: Exhibit, line: Line, parallel: Parallel) -> float | None:
        """Milliseconds of an epoch of the last stage; None where nothing is trained in it."""
        run = self._one_worker(exhibit, line)
        if not stages_of(run)[-1].epochs:
            return None
        return 1000 * epoch_seconds(run, calibrate(run, parallel, TIMED), self._images(run))

    def _training_time(self, exhibit: Exhibit, line: Line, parallel: Parallel) -> float | None:
        """Times the line that nothing is changed in; None of the controls. Raises ConfigError without that line."""
        if line.system.name in CONTROLS:
            return None
        own = (other for other in exhibit.lines if other.system.name not in CONTROLS)
        usual = next((other for other in own if not other.system.settings), None)
        if usual is None or self.outcomes[self.plan.units(exhibit, usual)[0].key].error:
            raise ConfigError("there is no time of training with the preset's settings to divide by")
        run, first = self._one_worker(exhibit, line), self._one_worker(exhibit, usual)
        if exhibit.name not in self._paces:
            self._paces[exhibit.name] = calibrate(first, parallel, TIMED)
        known, images = self._paces[exhibit.name], self._images(run)
        return own_seconds(run, known, images) / own_seconds(first, known, images)

    def _one_worker(self, exhibit: Exhibit, line: Line) -> RunConfig:
        """The run of a line at the first seed, as one worker does it."""
        run = self.plan.trainings[self.plan.units(exhibit, line)[0].key].run
        return replace(run, scaling=replace(run.scaling, workers=1))

    def _images(self, run: RunConfig) -> int:
        return split_sizes(run.data, opener(run.storage))[0]

    @property
    def comparable(self) -> bool:
        """Whether what was asked for is what the printed numbers are of, but for what a budget shortens."""
        return self.preset in OF_THE_PAPER and as_one_of(self.config, preset(self.preset))

    @cached_property
    def sections(self) -> list[Section]:
        """Each exhibit with its cells and its picture."""
        return [self._section(exhibit) for exhibit in self.plan.exhibits]

    def _section(self, exhibit: Exhibit) -> Section:
        exhibit = replace(exhibit, notes=(*exhibit.notes, *self._judged_longer(exhibit)))
        norm, again = self.config.attack.norm, self.commands[exhibit.name]
        cells = cells_of(self.plan, exhibit, self.outcomes, norm, self.comparable, again)
        if not exhibit.picture:
            return Section(exhibit, cells)
        try:
            if exhibit.picture == "sweep":
                return Section(exhibit, cells, swept(exhibit, cells))
            return Section(exhibit, cells, PICTURES[exhibit.picture](self._scene(exhibit)))
        except Exception as error:  # a picture that fails must not cost the numbers
            left_out = reason_of(error)
            return Section(exhibit, cells, left_out=left_out)

    def _judged_longer(self, exhibit: Exhibit) -> list[str]:
        """Which lines another exhibit had judged by a longer suite than this one asks for: they met more."""
        by_suite: dict[str, list[str]] = {}
        for line in exhibit.lines:
            suite = self.plan.run_of(self.plan.units(exhibit, line)[0]).evaluation.suite
            by_suite.setdefault(suite, []).append(line.label)
        longer = by_suite.get("paper", []) if "quick" in by_suite else []
        if not longer:
            return []
        return [
            f"Judged by suite paper, as another table asks for it: {'; '.join(longer)}; the other lines by quick. The"
            " strongest of these is of fewer attacks, and of MALT in 20 steps a class where paper has 30: over None"
            " compares what both met, MALT by its name."
        ]

    def _scene(self, exhibit: Exhibit) -> Scene:
        """What the figure is drawn from: the first seed's defenses."""
        config = self.config

        def folder(line: Line) -> str:
            return self.outcomes[self.plan.units(exhibit, line)[0].key].checkpoint

        defenses = {
            line.system.target or line.system.name: load_defense_folder(
                open_path(folder(line), config.storage), trust_code=True
            )
            for line in exhibit.lines
            if folder(line)
        }
        test = load_data(config).test
        return Scene(defenses, test, config.attack, config.evaluation.steps or 20, config.seed)

    @cached_property
    def versions(self) -> list[Versions]:
        """The code that trained and judged each system."""
        return versions_of(self.plan, self.outcomes)

    @cached_property
    def evidence(self) -> list[dict[str, str]]:
        """A line of texts for each cell."""
        return [{"exhibit": each.exhibit.name, **row} for each in self.sections for row in each.evidence]

    @cached_property
    def notes(self) -> list[str]:
        """How the page is to be read, and what failed."""
        made = [*READING, *([REPLAYS] if any(end.claim for end in self.outcomes.values()) else [])]
        if not self.comparable:
            run, word = self.config, "SVHN" if self.preset.startswith("svhn") else "CIFAR-10"
            limited = "" if run.data.limit is None else f", {run.data.limit} images of a split at most"
            norm = "L-infinity" if run.attack.norm == "linf" else "L2"
            made.append(
                f"The paper's numbers are of {word}, ResNet-18 by AT, and L-infinity 8/255 = {8 / 255:.4f} in steps of"
                f" 2/255 = {2 / 255:.4f}. Here it is {run.data.name}{limited}, {run.target.architecture}, and"
                f" {norm} {run.attack.epsilon:.4f} in steps of {run.attack.step_for(20):.4f}: compare orders and what"
                " is gained over None, not accuracies."
            )
        if self.plan.factor != 1:
            made.append(f"All schedules are {self.plan.factor:g} times the presets': nothing here is at its best.")
        if line := several(self.versions):
            made.append(line)
        errors = {unit.name: self.outcomes[unit.key].error for unit in self.plan.all}
        return [*made, *(f"Failed: {name}: {error}" for name, error in errors.items() if error)]

    def files(self, title: str, facts: Mapping[str, str]) -> dict[str, bytes]:
        """The page as HTML, Markdown and JSON, and its pictures, by the names of files."""
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        shown = {**facts, "machine": machine, "schedules": f"times {self.plan.factor:g}"}
        self.plain: dict[str, Any] = {"title": title, "facts": shown, "notes": self.notes}
        self.plain["exhibits"] = [section.to_plain() for section in self.sections]
        self.plain["code"] = [each.to_plain() for each in self.versions]
        pictures = {f"{each.exhibit.name}.png": each.picture.png for each in self.sections if each.picture is not None}
        return {
            "reproduction.html": to_html(title, shown, self.notes, self.sections, self.versions).encode(),
            "reproduction.md": to_markdown(title, shown, self.notes, self.sections, self.versions).encode(),
            "reproduction.json": json.dumps(self.plain, indent=1).encode(),
            **pictures,
            **self._claims(),
        }

    def _claims(self) -> dict[str, bytes]:
        """The claim of each unit, and the leaderboard of those that are not refused, by the names of files."""
        made, taken, refused = dict[str, bytes](), list[Claim](), list[str]()
        shorter = f" ({of_schedules(self.plan.factor)})" if self.plan.factor != 1 else ""
        for unit in self.plan.all:
            claim, file = self.outcomes[unit.key].claim, _claim_file(unit)
            if claim is None:
                continue
            made[file] = json.dumps(claim, indent=1).encode()
            if problem := problem_of(claim):
                refused.append(problem)
            else:
                taken.append(Claim(PurePosixPath(file).stem + shorter, claim))
        for problem in dict.fromkeys(refused):
            self.terminal.say(f"left off the leaderboard: {refused.count(problem)} claims: {problem}")
        if taken:
            tables = by_threat(taken)
            made |= {
                "leaderboard.md": as_markdown(tables, "# Leaderboard\n\n").encode(),
                "leaderboard.html": as_page(tables).encode(),
            }
        return made


def _claim_file(unit: Unit) -> str:
    """Where the claim of a unit lies, beside the page."""
    return "claims/" + re.sub(r"[^\w.]+", "-", unit.name) + ".json"
