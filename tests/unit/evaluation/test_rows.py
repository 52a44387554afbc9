"""How many rows pass at a time where nobody said it: as ever on a CPU, what fits on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import evaluate, rng
from dircluster.config import USUAL_ROWS, DataConfig, EvaluationConfig
from dircluster.defenses.base import Defended
from dircluster.defenses.dir import MaskedPurifier
from dircluster.evaluation.evaluation import Evaluation
from dircluster.evaluation.provenance import facts_of
from dircluster.evaluation.rows import FEW, MOST_ROWS, doubled, fitting_rows, gradient, peak
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.victim import VictimModel
from dircluster.models.classifiers import build
from dircluster.presets.dir import MaskingConfig
from tests.unit.defenses.conftest import TINY

GIB, MIB = 2**30, 2**20
SETTINGS = EvaluationConfig(batch_size=8, steps=1, eot=2, draws=2)


@pytest.fixture
def defense() -> Defended:
    with rng.seeded_torch_rng(0, "rows"):
        return Defended(MaskedPurifier(TINY, MaskingConfig(), 1, 8, 8), build("small_cnn", DataConfig()))


@pytest.mark.parametrize(
    ("a_row", "alike", "available", "rows"),
    [
        (19 * MIB, 0, 78 * GIB, 2048),  # the paper's model on an H100: 38 GiB
        (19 * MIB, 3 * GIB, 78 * GIB, 1024),
        (19 * MIB, 0, 20 * GIB, 512),
        (19 * MIB, 0, 8 * GIB, 256),  # as before, whatever becomes of it
        (0, 0, GIB, MOST_ROWS),
    ],
)
def test_rows_are_doubled_while_half_of_the_memory_holds_them(
    a_row: int, alike: int, available: int, rows: int
) -> None:
    assert doubled(lambda count: alike + count * a_row, available) == rows


def test_what_libraries_try_in_a_first_pass_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    held, done = [0], list[int]()
    for name, value in {
        "reset_peak_memory_stats": lambda device: held.__setitem__(0, 5),
        "memory_allocated": lambda device: 5,
        "max_memory_allocated": lambda device: held[0],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def work() -> None:
        held[0] = max(held[0], 15 if done else 9 * GIB)
        done.append(1)

    assert peak(work, torch.device("cuda")) == 10


def test_asking_what_a_row_takes_changes_nothing(defense: Defended, digits: tuple[Tensor, Tensor]) -> None:
    somebodys = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10)).train()
    for module in (defense, somebodys):
        seen: list[int] = []
        victim = VictimModel(module, "d")
        modes = [part.training for part in module.modules()]
        states = [stream.get_state() for stream in rng.streams()]
        (module.classifier if isinstance(module, Defended) else module).register_forward_pre_hook(
            lambda part, inputs, seen=seen: seen.append(len(inputs[0]))
        )
        gradient(victim, digits[0][:5], FEW)
        assert seen == [FEW]
        assert all(torch.equal(a, b.get_state()) for a, b in zip(states, rng.streams(), strict=True))
        assert [part.training for part in module.modules()] == modes
        assert all(p.grad is None for p in module.parameters())


def test_a_cpu_has_the_usual_rows_and_their_bits(defense: Defended, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:8], digits[1][:8]
    assert fitting_rows(VictimModel(defense, "d"), images) == USUAL_ROWS
    found: list[Any] = []
    for settings in (SETTINGS, dataclasses.replace(SETTINGS, rows=USUAL_ROWS)):
        store = MemoryStore()
        found.append(evaluate(defense, images, labels, settings=settings, store=store).rows)
        assert {kept["rows"] for kept in store.kept.values()} == {USUAL_ROWS}
    assert found[0] == found[1]
    given = facts_of("d", "data", 8, 0, dataclasses.replace(SETTINGS, rows=USUAL_ROWS))
    assert facts_of("d", "data", 8, 0, SETTINGS) == given


def test_rows_that_are_given_are_kept(defense: Defended, digits: tuple[Tensor, Tensor]) -> None:
    store = MemoryStore()
    evaluate(defense, digits[0][:4], digits[1][:4], settings=dataclasses.replace(SETTINGS, rows=3), store=store)
    assert {kept["rows"] for kept in store.kept.values()} == {3}
    assert Evaluation([], 4, 0, 4, 3, store, VictimModel(defense, "d")).most_rows == 3
