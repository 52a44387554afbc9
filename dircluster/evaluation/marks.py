"""What tells a row's reader that its accuracy may say little: what was counted while its attack ran, and what that
means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dircluster.evaluation.statistics import wilson_interval

Kind = Literal["gradient", "slope", "ascent", "finite", "constant"]
WORDS: dict[Kind, str] = {
    "gradient": "gradients missing, NaN or zero: {:.1f} %",
    "slope": "loss rose by less than a tenth of what its gradient says: {:.1f} % of images",
    "ascent": "loss ended below its start: {:.1f} % of images",
    "finite": "logits not finite, which counts as wrong: {:.1f} %",
    "constant": "one class for all natural images: {:.1f} %",
}
"""The text of a mark, given its share in [0, 1]."""
MEANING: dict[Kind, str] = {
    "gradient": "The attack could not see where to go: no gradient, or none that is a number, came back.",
    "slope": "The gradient does not say how the loss moves: the attack went where nothing is gained.",
    "ascent": "The attack ended weaker than it began.",
    "finite": "The defense answered NaN or infinity while it was attacked.",
    "constant": "It has collapsed, or learned nothing: what no attack takes is the share of one class.",
}
"""What that tells a reader."""
MISLEADING: tuple[Kind, ...] = ("slope",)
"""What tells of the gradient itself, whichever attack follows it; an ascent may also fall by its steps."""
DEAD = 0.01
"""Share of gradients that may be missing, NaN or zero."""
FALLEN = 0.08
"""Share of images whose loss may surely end below its start: where gradients mean nothing, it is a quarter or more."""
ENOUGH = 20
"""Natural images whose one class is no chance."""
FLAT = 0.2
"""Share of images whose loss may surely rise by less than a tenth of what the gradient says of the first step."""


@dataclass(frozen=True)
class Mark:
    """Why a row's accuracy may flatter."""

    kind: Kind
    share: float
    """Of what its attack asked for, or of natural images, in [0, 1]."""
    seen_in: str = ""
    """The row that showed it, where this row's attack follows the same gradient and does not look itself."""

    def __str__(self) -> str:
        words = WORDS[self.kind].format(100 * self.share)
        return f"in {self.seen_in}: {words}" if self.seen_in else words


@dataclass(frozen=True)
class Seen:
    """Counts of each kind: how many were bad, and of how many. Those of several shards add up."""

    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, shards: Iterable[Mapping[str, Any]]) -> Seen:
        """The sum over the counts of shards, as they are stored."""
        counts: dict[str, tuple[int, int]] = {}
        for shard in shards:
            for kind, (bad, total) in shard.items():
                before = counts.get(kind, (0, 0))
                counts[kind] = (before[0] + bad, before[1] + total)
        return cls(counts)

    def share(self, kind: Kind) -> float:
        """The bad share, in [0, 1]; 0 where nothing was seen."""
        bad, total = self.counts.get(kind, (0, 0))
        return bad / total if total else 0.0

    def surely(self, kind: Kind, share: float) -> bool:
        """Whether the bad share is above ``share`` by more than chance explains."""
        bad, total = self.counts.get(kind, (0, 0))
        return total > 0 and wilson_interval(bad, total)[0] > share

    def fallen(self) -> bool:
        """Whether the loss ended below its start at more images than chance and noise explain."""
        return self.surely("ascent", FALLEN)

    def marks(self) -> tuple[Mark, ...]:
        """What a row with these counts is marked with."""
        found: dict[Kind, bool] = {
            "gradient": self.share("gradient") > DEAD,
            "slope": self.surely("slope", FLAT),
            "ascent": self.fallen(),
            "finite": self.share("finite") > 0,
        }
        return tuple(Mark(kind, self.share(kind)) for kind, marked in found.items() if marked)


def shared_marks(rows: Sequence[tuple[str, Sequence[Mark]]]) -> list[tuple[Mark, ...]]:
    """The marks of rows whose attacks follow one gradient: what one of them shows of it holds for all.

    Each row is its attack's name and its own marks. A gradient that points the wrong way is seen by attacks that climb
    one loss from known draws alone: others change their loss, or meet other draws, on the way.
    """
    seen = [replace(mark, seen_in=name) for name, own in rows for mark in own if mark.kind in MISLEADING]
    shown = {mark.kind: mark for mark in reversed(seen)}  # the first that showed it
    return [(*own, *(m for m in shown.values() if m.kind not in {o.kind for o in own})) for _, own in rows]


def explained(mark: Mapping[str, Any]) -> str:
    """A mark as plain data: what was counted, and what that tells."""
    return f"{Mark(**mark)}. {MEANING[mark['kind']]}"


def in_words(marks: Iterable[Mapping[str, Any]]) -> str:
    """The marks of a row as plain data, in a few words; empty where there are none."""
    return "; ".join(str(Mark(**mark)) for mark in marks)
