"""Evaluation: attacks times shards of images, each a piece of work whose outcome is kept, then rows of a table.

What comes out of a shard follows from the seed, the attack and the shard's number alone: neither from who works on it,
nor from what was done before. So shards may be shared out to any number of workers, and an evaluation that was killed
goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import digest
from dircluster.defenses.base import Defended
from dircluster.evaluation.attack_runner import AttackRunner, judge
from dircluster.evaluation.attack_table import AttackSetting, AttackSpec, find_attack, modules_of_attack
from dircluster.evaluation.marks import Seen
from dircluster.evaluation.pictures import kept_pictures, read_pictures
from dircluster.evaluation.provenance import code_digest, machine, modules_of
from dircluster.evaluation.results import Control, Result
from dircluster.evaluation.rows import fitting_rows
from dircluster.evaluation.statistics import wilson_interval
from dircluster.evaluation.store import ResultStore
from dircluster.evaluation.streams import OwnStreams
from dircluster.evaluation.victim import VictimModel
from dircluster.evaluation.watch import Watch
from dircluster.models.modules import under_attack
from dircluster.models.precision import Precision, autocast, exact, is_half, many_shapes, reads_images_whole

NEARLY = 1 / 64
"""Share of the spread of an image's logits by which bf16 may move them with the images beside it; a hundredth was
seen."""


@dataclass(frozen=True)
class EvalShard:
    """One attack on one shard of the images."""

    spec: AttackSpec
    number: int
    rows: tuple[int, int]

    @property
    def name(self) -> str:
        """Where its outcome is kept."""
        folder = f"{self.spec.name}-{self.spec.randomness}-{digest(asdict(self.spec))[:8]}"
        return f"{folder}/shard-{self.number:05d}"


class Evaluation:
    """The units of an evaluation of a ``victim`` and what has come of them. Each finished one is read once."""

    def __init__(
        self,
        specs: Sequence[AttackSpec],
        images: int,
        seed: int,
        shard_size: int,
        most_rows: int | None,
        store: ResultStore,
        victim: VictimModel,
        precision: Precision = "auto",
        bare_store: ResultStore | None = None,
    ) -> None:
        """``most_rows`` pass at a time, as many as fit where none are given; ``precision`` is what attacks are crafted
        in, see :func:`crafting`. ``bare_store`` keeps what is found of the bare target, for all that stand before it.
        """
        self.specs, self.images, self.seed = list(specs), images, seed
        self.shard_size, self.most_rows, self.store = shard_size, most_rows, store
        self.bare_store, self.victim, self.precision = bare_store, victim, precision
        self._read: dict[str, dict[str, Any]] = {}

    def shards(self, spec: AttackSpec | None = None) -> Iterator[EvalShard]:
        """All shards, or those of one attack, in the order of the table."""
        for one in self.specs if spec is None else [spec]:
            total = self.images if one.first is None else min(one.first, self.images)
            for number, start in enumerate(range(0, total, self.shard_size)):
                yield EvalShard(one, number, (start, min(start + self.shard_size, total)))

    def open_shards(self) -> list[EvalShard]:
        """The shards that nobody has finished."""
        return [shard for shard in self.shards() if self.outcome(shard) is None]

    def outcome(self, shard: EvalShard) -> dict[str, Any] | None:
        """What came out of a shard; None while it is not finished, or only by other code than this."""
        found = self._read.get(shard.name)
        if found is None:
            found = self._store(shard.spec).get(shard.name)
            if found is None or found.get("code") != code(shard.spec, self.victim):
                return None
            self._read[shard.name] = found
        return found

    def wait(self, asked_to_stop: Callable[[], int]) -> int:
        """Until all shards are finished, whoever works on them, or a signal asks to stop; -> the signal, or 0."""
        left = self.open_shards()
        while left:
            if signal := asked_to_stop():
                return signal
            time.sleep(0.5)
            left = [shard for shard in left if self.outcome(shard) is None]
        return 0

    def work(self, shard: EvalShard, images: Tensor, labels: Tensor) -> None:
        """Attack and judge the shard's ``images`` (n, C, H, W) in [0, 1], and keep what came out."""
        began, victim = time.monotonic(), self.victim
        seed = rng.entropy(self.seed, "judgement/attack", step=shard.number)  # all attacks start the same: fair pairs
        fixed = rng.entropy(self.seed, "judgement/known", step=shard.number)
        fresh = rng.entropy(self.seed, "judgement/anew", step=shard.number)
        if self.most_rows is None:
            with many_shapes():
                self.most_rows = fitting_rows(victim, images)
        passes = shard.spec.average if shard.spec.protocol == "mv" else shard.spec.eot
        watch = Watch(len(images), passes if victim.apart else 1)
        watched = victim.watched_by(watch)
        attack = AttackRunner(watched, shard.spec, seed, fixed, self.most_rows)
        counts = shard.spec.protocol == "wor"  # what its steps see is claimed
        crafted = "fp32" if counts else crafting(self.precision, victim, images.device, shard.spec.bare)
        with under_attack(*victim.modules), many_shapes():
            with crafted_in(crafted, images.device, *victim.modules):
                found, warned = attack(images, labels)
                left = attack.wrong(found, labels, NEARLY) if crafted == "bf16" and attack.leaves else None
            if left is not None:
                found, warned = _without_rounding(attack, images, labels, found, warned, left)
            with torch.no_grad(), exact(images.device):
                answered = judge(watched, shard.spec, fixed, fresh, self.most_rows, attack.broken)(found, labels)
        lost = int((~found.isfinite().flatten(1).all(dim=1)).sum())
        if lost:
            warned = [*warned, f"{lost} of {len(found)} final images of a shard are not finite"]
        found = found.float().cpu()
        right = {name: part if part.dtype == torch.bool else part == labels[:, None] for name, part in answered.items()}
        outcome = {
            "right": {
                name: ["".join("01"[bit] for bit in row) for row in part.int().tolist()] for name, part in right.items()
            },
            "predicted": {name: part.tolist() for name, part in answered.items() if part.dtype != torch.bool},
            "pictures": kept_pictures(found, shard.rows[0]) if shard.spec.epsilon else None,
            "code": code(shard.spec, victim),
            "sha256": hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest(),
            "warnings": warned,
            "crafting": crafted,
            "machine": machine(images.device),
            "rows": self.most_rows,
            "seen": watch.counts(),
            "seconds": round(time.monotonic() - began, 3),
        }
        self._store(shard.spec).put(shard.name, outcome, found)
        self._read[shard.name] = outcome

    def right(self, spec: AttackSpec) -> dict[str, Tensor]:
        """What was right in a finished attack: fixed (N, 1) and fresh (N, draws), bool, where it has them."""
        parts: dict[str, list[str]] = {}
        for outcome in self._outcomes(spec):
            for name, rows in outcome["right"].items():
                parts.setdefault(name, []).extend(rows)
        return {name: torch.tensor([[c == "1" for c in row] for row in rows]) for name, rows in parts.items()}

    def predicted(self, spec: AttackSpec) -> dict[str, Tensor]:
        """The classes predicted in a finished attack, as in :meth:`right`, int64; nothing where no class counts."""
        parts: dict[str, list[list[int]]] = {}
        for outcome in self._outcomes(spec):
            for name, rows in outcome.get("predicted", {}).items():
                parts.setdefault(name, []).extend(rows)
        return {name: torch.tensor(rows) for name, rows in parts.items()}

    def pictures(self, spec: AttackSpec) -> Tensor | None:
        """The first adversarial images of a finished attack, as pictures: (n, C, H, W) uint8; None where none are."""
        found = [read_pictures(o["pictures"]) for o in self._outcomes(spec) if o.get("pictures")]
        return torch.cat(found) if found else None

    def adversarial(self, spec: AttackSpec) -> Tensor:
        """All adversarial images of a finished attack, (N, C, H, W) float32. Raises LookupError where none are kept."""
        found = [self._store(spec).images(shard.name) for shard in self.shards(spec)]
        if any(part is None for part in found):
            raise LookupError(f"the images of {spec.name} were not kept")
        return torch.cat([part for part in found if part is not None])

    def shares(self, spec: AttackSpec) -> Tensor:
        """Each image's accuracy in a finished attack, (N,) float64: under fixed draws, else over fresh ones."""
        right = self.right(spec)
        return right.get("fixed", right.get("fresh", torch.empty(0))).double().mean(dim=1)

    def seen(self, spec: AttackSpec) -> Seen:
        """What a finished attack met on its way."""
        return Seen.of(outcome.get("seen", {}) for outcome in self._outcomes(spec))

    def result(self, spec: AttackSpec, defense: str) -> Result:
        """A finished attack as a row."""
        right = self.right(spec)
        main = right.get("fixed", right.get("fresh", torch.empty(0)))
        again = right.get("fresh", main)
        outcomes = list(self._outcomes(spec))
        correct, judged, total = int(main.sum()), main.numel(), len(main)
        return Result(
            defense="none" if spec.judged == "target" else defense,
            attack=spec.name,
            randomness="none" if spec.judged == "target" else spec.randomness,
            accuracy=correct / judged,
            correct=correct,
            judged=judged,
            total=total,
            interval=wilson_interval(correct / judged * total, total),
            draws=again.shape[1],
            mean=again.double().mean().item(),
            worst=again.double().mean(dim=0).min().item(),
            always=again.all(dim=1).double().mean().item(),
            norm=spec.norm,
            epsilon=spec.epsilon,
            steps=spec.steps,
            step_size=spec.step_size if spec.steps and find_attack(spec.attack).counts == "steps" else 0.0,
            restarts=spec.restarts,
            eot=spec.eot,
            loss=spec.loss,
            average=spec.average,
            sha256=hashlib.sha256("".join(o["sha256"] for o in outcomes).encode()).hexdigest(),
            warnings=tuple(dict.fromkeys(w for o in outcomes for w in o["warnings"])),
            crafting=" and ".join(sorted({o.get("crafting", "fp32") for o in outcomes})),
            protocol=spec.protocol_name,
            natural=self._control(spec.control("natural")),
            noise=self._control(spec.control("noise")),
            marks=self.seen(spec).marks(),
        )

    def _control(self, spec: AttackSpec | None) -> Control | None:
        """What a control that was evaluated has left."""
        if spec is None or spec not in self.specs:
            return None
        right = self.right(spec)
        main = right.get("fixed", right.get("fresh", torch.empty(0)))
        again = right.get("fresh", main).double()
        return Control(
            main.double().mean().item(), again.mean(dim=0).min().item(), again.all(dim=1).double().mean().item()
        )

    def seconds(self, spec: AttackSpec) -> float:
        """One worker's time that a finished attack took."""
        return float(sum(outcome["seconds"] for outcome in self._outcomes(spec)))

    @property
    def machine(self) -> str:
        """The kinds of machines that all attacks were finished on, see :func:`provenance.machine`."""
        kinds = {o.get("machine", "not noted") for spec in self.specs for o in self._outcomes(spec)}
        return " and ".join(sorted(kinds))

    def _store(self, spec: AttackSpec) -> ResultStore:
        return self.bare_store if spec.bare and self.bare_store is not None else self.store

    def _outcomes(self, spec: AttackSpec) -> Iterator[dict[str, Any]]:
        for shard in self.shards(spec):
            outcome = self.outcome(shard)
            if outcome is None:
                raise LookupError(f"{shard.name} is not finished")
            yield outcome


def _without_rounding(
    attack: AttackRunner, images: Tensor, labels: Tensor, found: Tensor, warned: list[str], left: Tensor
) -> tuple[Tensor, list[str]]:
    """``found`` and ``warned`` once images that only bf16 got wrong have been attacked in fp32.

    ``left`` (N,) bool tells which bf16 got wrong, or nearly: among other images than these the attack may have seen
    them wrong, and left them, however far it was from breaking them.
    """
    with exact(images.device):
        rows = (left & ~attack.wrong(found, labels)).nonzero()[:, 0]
        if len(rows) == 0:
            return found, warned
        again, more = attack(images[rows], labels[rows])
    return found.index_copy(0, rows, again.to(found)), [*warned, *more]


def crafting(
    precision: Precision, victim: VictimModel, device: torch.device, bare: bool = False
) -> Literal["fp32", "bf16"]:
    """What attacks on ``victim``, or its ``bare`` target, are computed in: auto is bf16 on a GPU where bf16 does not
    round the images.
    """
    module = victim.module
    parts = (module.purifier, module.classifier) if isinstance(module, Defended) else (module,)
    read = parts[1:] if bare and len(parts) > 1 else (*parts, *victim.modules[1:])
    rounded = precision == "auto" and not reads_images_whole(*read)
    return "bf16" if is_half(precision, device) and not rounded else "fp32"


def crafted_in(
    precision: Literal["fp32", "bf16"], device: torch.device, *still: nn.Module
) -> AbstractContextManager[None]:
    """What :func:`crafting` says: fp32 is that of final predictions, for some attacks leave what a pass got wrong."""
    return exact(device) if precision == "fp32" else autocast(precision, device, *still)


def code(spec: AttackSpec, victim: VictimModel) -> str:
    """Digest of the source that decides what a shard finds: that of its attack, of the defense, and of this room."""
    parts = (victim.target,) if spec.bare else (*victim.modules, victim.target, victim.source)
    models = [part for part in parts if isinstance(part, nn.Module)]
    used = frozenset({rng.__name__}).union(modules_of_attack(spec.attack), *map(modules_of, models))
    room = (AttackRunner, AttackSetting, OwnStreams, VictimModel, Watch)
    return code_digest(used, frozenset({__name__, *(part.__module__ for part in room)}))


def run(
    evaluation: Evaluation,
    batch: Callable[[int, int], tuple[Tensor, Tensor]],
    on_shard: Callable[[EvalShard, int, int], None] = lambda shard, done, total: None,
    mine: Callable[[int], bool] = lambda index: True,
) -> None:
    """Work through the open ones of the shards whose place is ``mine``; ``batch`` gives images and labels of rows."""
    waiting = [u for index, u in enumerate(evaluation.shards()) if mine(index) and evaluation.outcome(u) is None]
    for done, shard in enumerate(waiting):
        on_shard(shard, done, len(waiting))
        evaluation.work(shard, *batch(*shard.rows))
