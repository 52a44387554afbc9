"""Judging: cases times shards of images, each a unit of work whose outcome is kept, then rows of a table.

What a unit finds follows from the seed, the case and the shard's number alone: neither from who works on it, nor from
what was done before. So units may be shared out to any number of workers, and a judgement that was killed goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import digest
from dircluster.defenses.recipe import crafting
from dircluster.evaluation.attack_runner import Crafter, judge, modules_of_attack
from dircluster.evaluation.provenance import code_digest, modules_of
from dircluster.evaluation.results import Result
from dircluster.evaluation.statistics import wilson_interval
from dircluster.evaluation.store import Shelf
from dircluster.evaluation.suites import Case
from dircluster.evaluation.victim import Subject


@dataclass(frozen=True)
class Unit:
    """One case on one shard."""

    case: Case
    number: int
    rows: tuple[int, int]

    @property
    def name(self) -> str:
        """Where its outcome is kept."""
        place = f"{self.case.name}-{self.case.masks}-{digest(asdict(self.case))[:8]}"
        return f"{place}/shard-{self.number:05d}"


class Judgement:
    """The units of a judgement of a ``subject`` and what has come of them. Each finished one is read once."""

    def __init__(
        self, cases: Sequence[Case], images: int, seed: int, shard: int, most_rows: int, shelf: Shelf, subject: Subject
    ) -> None:
        self.cases, self.images, self.seed = list(cases), images, seed
        self.shard, self.most_rows, self.shelf = shard, most_rows, shelf
        self.subject = subject
        self._read: dict[str, dict[str, Any]] = {}

    def units(self, case: Case | None = None) -> Iterator[Unit]:
        """All units, or those of one case, in the order of the table."""
        for one in self.cases if case is None else [case]:
            total = self.images if one.first is None else min(one.first, self.images)
            for number, start in enumerate(range(0, total, self.shard)):
                yield Unit(one, number, (start, min(start + self.shard, total)))

    def open_units(self) -> list[Unit]:
        """The units that nobody has finished."""
        return [unit for unit in self.units() if self.outcome(unit) is None]

    def outcome(self, unit: Unit) -> dict[str, Any] | None:
        """What came out of a unit; None while it is not finished, or only by other code than this."""
        found = self._read.get(unit.name)
        if found is None:
            found = self.shelf.get(unit.name)
            if found is None or found.get("code") != code(unit.case, self.subject):
                return None
            self._read[unit.name] = found
        return found

    def wait(self, asked_to_stop: Callable[[], int]) -> int:
        """Until all units are finished, whoever works on them, or a signal asks to stop; -> the signal, or 0."""
        left = self.open_units()
        while left:
            if signal := asked_to_stop():
                return signal
            time.sleep(0.5)
            left = [unit for unit in left if self.outcome(unit) is None]
        return 0

    def work(self, unit: Unit, images: Tensor, labels: Tensor) -> None:
        """Craft and judge the unit's ``images`` (n, C, H, W) in [0, 1], and keep what came out."""
        began, subject = time.monotonic(), self.subject
        seed = rng.entropy(self.seed, "judgement/attack", step=unit.number)  # all cases start alike: fair pairs
        known = rng.entropy(self.seed, "judgement/known", step=unit.number)
        anew = rng.entropy(self.seed, "judgement/anew", step=unit.number)
        craft = Crafter(subject, unit.case, seed, known, self.most_rows)
        with crafting(*subject.modules):
            found, warned = craft(images, labels)
            with torch.no_grad():
                right = judge(subject, unit.case, known, anew, self.most_rows)(found, labels)
        lost = int((~found.isfinite().flatten(1).all(dim=1)).sum())
        if lost:
            warned = [*warned, f"{lost} of {len(found)} final images of a shard are not finite"]
        found = found.float().cpu()
        outcome = {
            "right": {
                name: ["".join("01"[bit] for bit in row) for row in part.int().tolist()] for name, part in right.items()
            },
            "code": code(unit.case, subject),
            "sha256": hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest(),
            "warnings": warned,
            "seconds": round(time.monotonic() - began, 3),
        }
        self.shelf.put(unit.name, outcome, found)
        self._read[unit.name] = outcome

    def right(self, case: Case) -> dict[str, Tensor]:
        """What was right in a finished case: known (N, 1) and anew (N, draws), bool, where it has them."""
        parts: dict[str, list[str]] = {}
        for outcome in self._outcomes(case):
            for name, rows in outcome["right"].items():
                parts.setdefault(name, []).extend(rows)
        return {name: torch.tensor([[c == "1" for c in row] for row in rows]) for name, rows in parts.items()}

    def shares(self, case: Case) -> Tensor:
        """Each image's accuracy in a finished case, (N,) float64: under known draws, else over fresh ones."""
        right = self.right(case)
        return right.get("known", right.get("anew", torch.empty(0))).double().mean(dim=1)

    def result(self, case: Case, defense: str) -> Result:
        """A finished case as a row."""
        right = self.right(case)
        main = right.get("known", right.get("anew", torch.empty(0)))
        again = right.get("anew", main)
        outcomes = list(self._outcomes(case))
        correct, judged, total = int(main.sum()), main.numel(), len(main)
        return Result(
            defense="none" if case.judged == "target" else defense,
            attack=case.name,
            masks="none" if case.judged == "target" else case.masks,
            accuracy=correct / judged,
            correct=correct,
            judged=judged,
            total=total,
            interval=wilson_interval(correct / judged * total, total),
            draws=again.shape[1],
            mean=again.double().mean().item(),
            worst=again.double().mean(dim=0).min().item(),
            always=again.all(dim=1).double().mean().item(),
            norm=case.norm,
            epsilon=case.epsilon,
            steps=case.steps,
            step_size=case.step_size if case.steps and case.attack not in ("square", "autoattack") else 0.0,
            restarts=case.restarts,
            eot=case.eot,
            loss=case.loss,
            average=case.average,
            sha256=hashlib.sha256("".join(o["sha256"] for o in outcomes).encode()).hexdigest(),
            warnings=tuple(dict.fromkeys(w for o in outcomes for w in o["warnings"])),
        )

    def seconds(self, case: Case) -> float:
        """One worker's time that a finished case took."""
        return float(sum(outcome["seconds"] for outcome in self._outcomes(case)))

    def _outcomes(self, case: Case) -> Iterator[dict[str, Any]]:
        for unit in self.units(case):
            outcome = self.outcome(unit)
            if outcome is None:
                raise LookupError(f"{unit.name} is not finished")
            yield outcome


def code(case: Case, subject: Subject) -> str:
    """Digest of the source that decides what a unit finds: that of its attack, of the defense, and of this room."""
    models = [subject.module, *(m for m in (subject.target, subject.source) if isinstance(m, nn.Module))]
    used = frozenset({rng.__name__}).union(modules_of_attack(case.attack), *map(modules_of, models))
    return code_digest(used, frozenset({__name__, Crafter.__module__, Subject.__module__}))


def run(
    judgement: Judgement,
    batch: Callable[[int, int], tuple[Tensor, Tensor]],
    told: Callable[[Unit, int, int], None] = lambda unit, done, total: None,
    mine: Callable[[int], bool] = lambda place: True,
) -> None:
    """Work through the open ones of the units whose place is ``mine``; ``batch`` gives images and labels of rows."""
    waiting = [u for place, u in enumerate(judgement.units()) if mine(place) and judgement.outcome(u) is None]
    for done, unit in enumerate(waiting):
        told(unit, done, len(waiting))
        judgement.work(unit, *batch(*unit.rows))
