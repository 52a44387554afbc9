"""Which versions of the code trained and judged what a page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dircluster.evaluation.versions import UNKNOWN, short_version
from dircluster.reproduction.cells import Outcome
from dircluster.reproduction.plan import Plan, Training


@dataclass(frozen=True)
class Versions:
    """Of a system at a seed."""

    system: str
    """A unit's name."""
    judged_by: str
    """As its claim has it; UNKNOWN without one."""
    trained_by: Mapping[str, tuple[str, ...]]
    """By stage: several where it was gone on with by other code."""

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def to_texts(self) -> dict[str, str]:
        """For the page: one version where all stages have that one."""
        by_stage = {stage: ", ".join(map(short_version, versions)) for stage, versions in self.trained_by.items()}
        texts = set(by_stage.values())
        each = texts if len(texts) == 1 else [f"{stage}: {text}" for stage, text in by_stage.items()]
        return {"system": self.system, "trained by": "; ".join(each), "judged by": short_version(self.judged_by)}


def versions_of(plan: Plan, outcomes: Mapping[str, Outcome]) -> list[Versions]:
    """Of all units that came to their end."""
    found = []
    for unit in plan.all:
        ended = outcomes[unit.key]
        if not ended.error:
            stages = unit.stages if isinstance(unit, Training) else ended.trained_by
            trained = {stage: tuple(ended.trained_by.get(stage, ())) or (UNKNOWN,) for stage in stages}
            found.append(Versions(unit.name, ended.claim["facts"]["commit"] if ended.claim else UNKNOWN, trained))
    return found


def several(found: Sequence[Versions]) -> str:
    """The line that says so where not all is known to be of one version; else empty."""
    trained = (version for each in found for versions in each.trained_by.values() for version in versions)
    there = sorted(dict.fromkeys([*trained, *(each.judged_by for each in found)]), key=UNKNOWN.__eq__)
    if len(there) < 2:
        return ""
    return (
        f"What is shown comes from more than one version of the code ({', '.join(map(short_version, there))}): the"
        " table at the end says which trained and which judged what."
    )
