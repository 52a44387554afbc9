"""Rows say in what precision their attack was crafted and their accuracy computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import evaluate
from dircluster.config import DataConfig, EvaluationConfig
from dircluster.defenses.table import DEFENSES, find_defense
from dircluster.evaluation.attack_table import ATTACKS, Attack, AttackSpec
from dircluster.evaluation.evaluation import crafting
from dircluster.evaluation.provenance import facts_of
from dircluster.evaluation.results import Result
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.suites import how
from dircluster.evaluation.victim import VictimModel
from dircluster.models import classifiers
from dircluster.models.precision import autocast
from dircluster.presets import preset
from dircluster.training.stages import Networks
from tests.conftest import ALONE

CPU = torch.device("cpu")
QUICK = EvaluationConfig(batch_size=4, steps=2)


class Notes(nn.Module):
    """A classifier that keeps the types of what its inner product gives, with and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.inner = nn.Linear(64, 10)
        self.seen: set[tuple[bool, torch.dtype]] = set()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images.flatten(1))
        self.seen.add((torch.is_grad_enabled() and images.requires_grad, logits.dtype))
        return logits.float()


def judged(precision: Any, store: MemoryStore | None = None) -> tuple[Notes, list[Result]]:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    module, labels = Notes(), torch.arange(8) % 10
    settings = dataclasses.replace(QUICK, precision=precision)

    def begin(shard: Any, done: int, total: int) -> None:
        if done == 0:  # what is tried out before is neither crafted nor judged
            module.seen.clear()

    return module, evaluate(module, images, labels, settings=settings, store=store, on_shard=begin).rows


def test_attacks_are_crafted_as_asked_and_judged_in_fp32() -> None:
    module, rows = judged("bf16")
    crafted, seen, predicted = (True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)
    assert module.seen == {crafted, seen, predicted}  # seen: which images MALT left
    assert {(row.crafting, row.predictions) for row in rows} == {("bf16", "fp32")}
    assert "crafted in bf16" in how(dataclasses.asdict(rows[-1]))
    module, rows = judged("auto")
    assert {dtype for _, dtype in module.seen} == {torch.float32}
    assert {row.crafting for row in rows} == {"fp32"}


class Switches(Notes):
    """A classifier that keeps how a GPU would compute its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, bool]] = set()

    def forward(self, images: Tensor) -> Tensor:
        library: Any = torch.backends.cudnn
        self.found.add((library.conv.fp32_precision, library.benchmark))
        return super().forward(images)


@pytest.fixture
def as_training_leaves_it() -> Iterator[Any]:
    """PyTorch's library for GPUs, which tries kernels and rounds to TF32."""
    library: Any = torch.backends.cudnn
    before = library.benchmark, library.conv.fp32_precision
    library.benchmark, library.conv.fp32_precision = True, "tf32"
    yield library
    library.benchmark, library.conv.fp32_precision = before


def test_what_is_crafted_in_fp32_is_without_tf32_and_tries_no_kernels(as_training_leaves_it: Any) -> None:
    module, images = Switches(), torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    began = False

    def begin(shard: Any, done: int, total: int) -> None:
        nonlocal began
        if not began:  # what is tried out before is neither crafted nor judged
            module.found.clear()
        began = True

    evaluate(module, images, torch.arange(8) % 10, settings=QUICK, on_shard=begin)
    assert module.found == {("ieee", False)}
    assert as_training_leaves_it.benchmark
    assert as_training_leaves_it.conv.fp32_precision == "tf32"


class Coarse(Notes):
    """Logits around 100, of which bf16 leaves few apart: it gets almost every image wrong, or sees a tie."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.inner.bias += 100


@pytest.mark.parametrize(("attack", "steps"), [("malt", 20), ("pma", 20), ("autoattack", 20), ("square", 300)])
def test_an_image_that_only_rounding_gets_wrong_is_attacked_on(attack: str, steps: int) -> None:
    module, images = Coarse(), torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = module(images).argmax(dim=1)
    spec = AttackSpec(attack, epsilon=0.4, steps=steps)
    for precision in ("fp32", "bf16"):
        settings = dataclasses.replace(QUICK, batch_size=8, precision=precision)
        *_, row = evaluate(module, images, labels, settings=settings, attacks=[spec]).rows
        assert (row.attack, row.crafting, row.correct) == (attack, precision, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attack", [name for name, each in ATTACKS.items() if each.leaves is not Attack.leaves])
def test_an_attack_that_images_leave_knows_the_draws_of_those_that_stay(attack: str, precision: Any) -> None:
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    run = preset("digits_smoke")
    defense = find_defense(run.defense).defended(run, Networks(run, ALONE))
    with torch.no_grad():
        labels = defense.fixed(0)(images).argmax(dim=1)
    spec = AttackSpec(attack, "fixed", epsilon=0.2, steps=20)
    settings = dataclasses.replace(QUICK, batch_size=8, precision=precision)
    *_, row = evaluate(defense, images, labels, settings=settings, attacks=[spec]).rows
    assert (row.attack, row.randomness, row.total) == (attack, "fixed", 8)


def test_shards_of_either_kind_are_both_named_and_those_of_before_were_fp32() -> None:
    store = MemoryStore()
    judged("bf16", store)
    for name in [name for name in store.kept if name.endswith("shard-00000")]:
        del store.kept[name]["crafting"]
    assert {row.crafting for row in judged("bf16", store)[1]} == {"bf16 and fp32"}


def test_auto_crafts_in_bf16_on_a_gpu_where_that_does_not_round_images() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    ours = VictimModel(classifiers.build("small_cnn", DataConfig()), "none")
    somebodys = VictimModel(Notes(), "own")
    assert crafting("auto", ours, gpu) == "bf16"
    assert crafting("auto", ours, cpu) == crafting("auto", somebodys, gpu) == "fp32"
    assert crafting("bf16", somebodys, gpu) == "bf16"
    assert crafting("fp32", ours, gpu) == "fp32"


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defense_of_this_package_is_attacked_in_bf16_on_a_gpu_and_none_rounds_an_image(name: str) -> None:
    config = preset(f"digits_{name}_smoke".replace("_dir", ""))
    defense = find_defense(config.defense).defended(config, Networks(config, ALONE))
    assert crafting("auto", VictimModel(defense, name), torch.device("cuda")) == "bf16"
    if not list(defense.purifier.parameters()):  # no layer of it says so
        images, draws = torch.rand(4, 1, 8, 8), defense.draw(4)
        with autocast("bf16", CPU):
            half = defense.purifier(images, draws)
        assert torch.equal(half, defense.purifier(images, draws))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_asked_for_is_kept_apart_from_what_auto_finds(precision: Any) -> None:
    asked = facts_of("d", "data", 8, 0, dataclasses.replace(QUICK, precision=precision))
    assert asked == {**facts_of("d", "data", 8, 0, QUICK), "precision": precision}
