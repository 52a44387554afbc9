"""What a table or figure of the paper is made of: systems, the attacks that they meet, and what the paper prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Settings = Mapping[str, Any]
OWN_TARGET = ("menet", "menet_a", "ebm")
"""Systems that do not stand before the target of the others."""
ONE_WORKER = ("apegan", "nrp", "apegan_a", "nrp_a", "ebm")
"""Systems that one worker trains, however many the others have: GANs make several updates a step, and the chains of EBM
lie with one worker.
"""
LABELS = {
    "identity": "None",
    "finetune": "None, trained on",
    "apegan": "APE-GAN",
    "hgd": "HGD",
    "nrp": "NRP",
    "jatp": "JATP",
    "dir": "DIR",
    "apegan_a": "APE-GAN_A",
    "hgd_a": "HGD_A",
    "nrp_a": "NRP_A",
    "menet": "ME-Net",
    "menet_a": "ME-Net-A",
    "ebm": "EBM",
}
"""Systems by their names in presets and in --only, as tables call them; the first two are controls."""


@dataclass(frozen=True)
class System:
    """What a row is of: a preset, and what differs from it."""

    name: str
    """A name of LABELS."""
    settings: Settings = field(default_factory=dict)
    """By their dotted names."""
    onto: str = ""
    """Objective of another target, which the finished purifier is put in front of; empty where it stays."""

    @property
    def target(self) -> str:
        """Which target it is judged on; empty for that of the presets."""
        return self.name if self.name in OWN_TARGET else self.onto or self.settings.get("target.objective", "")


@dataclass(frozen=True)
class Printed:
    """A number of the paper."""

    value: float
    """Percent, or in the unit of its column."""
    where: str
    """Where it stands: table, row and column."""


@dataclass(frozen=True)
class Line:
    """A row of a table, or a point of a figure."""

    label: str
    system: System
    printed: Mapping[str, Printed] = field(default_factory=dict)
    """By column."""


@dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper."""

    name: str
    """As the command line calls it."""
    title: str
    columns: tuple[str, ...]
    """Attacks as rows of results call them at full length, or a name of MEASURED."""
    lines: tuple[Line, ...]
    suite: Literal["quick", "paper"] = "quick"
    """The cheapest suite that has these attacks, and one of AutoAttack's grade."""
    picture: str = ""
    """A name of pictures.PICTURES, or sweep: the figure that a sweep draws; empty where there is none."""
    notes: tuple[str, ...] = ()
    """What the paper leaves open or contradicts, and what was decided."""


MEASURED = {"ms an epoch": "milliseconds", "training time": "times that with pre-training"}
"""Columns that are timed instead of attacked, and their units."""
SHOWN, EMBEDDED, DISCARDED = 8, 200, 256
"""Images in the pictures, in the embedding, and behind Figure 2."""
