"""From the ends of units to the page: what is timed, what is drawn, notes, and files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from dircluster.cluster.console import Terminal
from dircluster.cluster.storage import open_path, opener
from dircluster.config import ConfigError, RunConfig, first_line, named_line
from dircluster.data.layout import split_sizes
from dircluster.data.sources import load
from dircluster.distributed.launch import local_workers
from dircluster.distributed.parallel import Parallel
from dircluster.reproduction.cells import Outcome, cells_of
from dircluster.reproduction.costs import TIMED, epoch_seconds, own_seconds
from dircluster.reproduction.exhibits import MEASURED, Exhibit, Line
from dircluster.reproduction.page import Section, to_html, to_markdown
from dircluster.reproduction.pictures import PICTURES, Scene, swept
from dircluster.reproduction.plan import Plan
from dircluster.reproduction.tables import CONTROLS
from dircluster.training.export import load_defense_folder
from dircluster.training.forecast import calibrate
from dircluster.training.run import data_cache
from dircluster.training.stages import stages_of

OF_THE_PAPER = ("cifar10", "svhn")
"""Presets whose numbers may be subtracted from printed ones."""
READING = (
    "Ours: mean over seeds, with the standard deviation (n - 1) where there are several. The interval (95 %, Wilson) is"
    " that of the mean as a share of n test images, which are the same for all seeds.",
    "Strongest: the attack that leaves the defense least, of PGD, the margin loss, AutoAttack or MALT, draws known or"
    " fresh with EOT. Votes, averaged logits, Wor.Rob and restored images do not count: they are other defenses or"
    " threats.",
    "Over None: points above the bare target under the same attack, ours and the paper's.",
)


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
    ) -> None:
        """``outcomes`` and ``commands`` by the units' keys."""
        self.plan, self.preset, self.config, self.terminal = plan, preset, config, terminal
        self.outcomes = {key: replace(end, commands=(commands[key],)) for key, end in outcomes.items()}
        timed = [exhibit for exhibit in plan.exhibits if set(exhibit.columns) & set(MEASURED)]
        if timed:
            terminal.say(f"timing steps for {' and '.join(exhibit.name for exhibit in timed)}")
            with local_workers(config.scaling) as parallel:
                for exhibit in timed:
                    try:
                        self._time(exhibit, parallel)
                    except Exception as error:  # what cannot be timed must not cost the accuracies
                        terminal.say(f"{exhibit.name} cannot be timed: {named_line(error)}")

    def _time(self, exhibit: Exhibit, parallel: Parallel) -> None:
        """Time steps of the last stages, here and now, at the first seed: what was trained may be of another hour."""
        first: tuple[RunConfig, Any] | None = None
        for line in exhibit.lines:
            key = self.plan.units(exhibit, line)[0].key
            run, found = self.plan.trainings[key].run, dict(self.outcomes[key].measured)
            if self.outcomes[key].error:
                continue
            images = split_sizes(run.data, opener(run.storage))[0]
            if "ms an epoch" in exhibit.columns and stages_of(run)[-1].epochs:
                found["ms an epoch"] = 1000 * epoch_seconds(run, calibrate(run, parallel, TIMED), images)
            if "training time" in exhibit.columns and line.system.name not in CONTROLS:
                first = first or (run, calibrate(run, parallel, TIMED))
                usual, known = first
                found["training time"] = own_seconds(run, known, images) / own_seconds(usual, known, images)
            self.outcomes[key] = replace(self.outcomes[key], measured=found)

    @cached_property
    def sections(self) -> list[Section]:
        """Each exhibit with its cells and its picture."""
        return [self._section(exhibit) for exhibit in self.plan.exhibits]

    def _section(self, exhibit: Exhibit) -> Section:
        same = self.preset in OF_THE_PAPER
        cells = cells_of(self.plan, exhibit, self.outcomes, self.config.attack.norm, same)
        if not exhibit.picture:
            return Section(exhibit, cells)
        try:
            if exhibit.picture == "sweep":
                return Section(exhibit, cells, swept(exhibit, cells))
            return Section(exhibit, cells, PICTURES[exhibit.picture](self._scene(exhibit)))
        except Exception as error:  # a picture that fails must not cost the numbers
            left_out = first_line(error) if isinstance(error, ConfigError) else named_line(error)
            return Section(exhibit, cells, left_out=left_out)

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
        test = load(config.data, config.seed, data_cache(config), opener(config.storage)).test
        return Scene(defenses, test, config.attack, config.evaluation.steps or 20, config.seed)

    @cached_property
    def evidence(self) -> list[dict[str, str]]:
        """A line of texts for each cell."""
        return [{"exhibit": each.exhibit.name, **row} for each in self.sections for row in each.evidence]

    @cached_property
    def notes(self) -> list[str]:
        """How the page is to be read, and what failed."""
        made = list(READING)
        if self.preset not in OF_THE_PAPER:
            made.append(
                "The paper's numbers are of CIFAR-10 at 8/255. These images are others: compare orders and what is"
                " gained over None, not accuracies."
            )
        if self.plan.factor != 1:
            made.append(f"All schedules are {self.plan.factor:g} times the presets': nothing here is at its best.")
        errors = {unit.name: self.outcomes[unit.key].error for unit in self.plan.all}
        return [*made, *(f"Failed: {name}: {error}" for name, error in errors.items() if error)]

    def files(self, title: str, facts: Mapping[str, str]) -> dict[str, bytes]:
        """The page as HTML, Markdown and JSON, and its pictures, by the names of files."""
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        shown = {**facts, "machine": machine, "schedules": f"times {self.plan.factor:g}"}
        self.plain: dict[str, Any] = {"title": title, "facts": shown, "notes": self.notes}
        self.plain["exhibits"] = [section.to_plain() for section in self.sections]
        pictures = {f"{each.exhibit.name}.png": each.picture for each in self.sections if each.picture is not None}
        return {
            "reproduction.html": to_html(title, shown, self.notes, self.sections).encode(),
            "reproduction.md": to_markdown(title, shown, self.notes, self.sections).encode(),
            "reproduction.json": json.dumps(self.plain, indent=1).encode(),
            **pictures,
        }
