"""The weights that come with the package keep on real images what they claim; RobustBench's tools find the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

import dircluster
from dircluster import rng, zoo
from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import LInf
from dircluster.config import DataConfig, EvaluationConfig
from dircluster.data.decode import decode
from dircluster.data.parquet import choose, contents
from dircluster.data.sources import load
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.claims import read_claim
from dircluster.evaluation.session import evaluate
from dircluster.evaluation.statistics import wilson_interval
from dircluster.models.modules import under_attack


def cifar10(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first test images, (N, 3, 32, 32) in [0, 1], and their labels."""
    file = next((folder / "cifar10").glob("test*.parquet"))
    table = pq.read_table(file).slice(0, count)
    blobs, labels = contents(table, choose(table.schema, file), file)
    images = decode(blobs, DataConfig(name="cifar10", height=32, width=32, channels=3)).float() / 255
    return images, torch.tensor(labels)


def claimed(name: str, column: str) -> float:
    row = read_claim(zoo.claim_of(f"zoo:{name}")).row(column)
    assert row is not None
    return float(row["accuracy"])


def test_cifar10_classifies_as_is_claimed(real_data: Path) -> None:
    images, labels = cifar10(real_data, 64)
    defense = dircluster.load_defense("zoo:cifar10-dir")
    with torch.no_grad():
        restored = defense.fixed(seed=0)(images).argmax(dim=1) == labels
        bare = defense.classifier(images).argmax(dim=1) == labels
    # Four standard deviations of 64 images below what was found of 1,000.
    assert restored.double().mean() > claimed("cifar10-dir", "natural") - 4 * 0.0523
    assert bare.double().mean() > claimed("cifar10-at", "natural") - 4 * 0.0464


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10-dir", "cifar10-at"])
def test_cifar10_keeps_what_is_claimed(name: str, real_data: Path) -> None:
    """256 test images under PGD-20, masks known: the claim of 1,000 lies within their interval."""
    images, labels = cifar10(real_data, 256)
    defense, attack = dircluster.load_defense(f"zoo:{name}").fixed(seed=0), LInf(8 / 255)
    right = {"natural": 0, "white box": 0}
    for few, (x, y) in enumerate(zip(images.split(32), labels.split(32), strict=True)):
        start = torch.rand(x.shape, generator=rng.generator(0, "tests/zoo", step=few))
        with under_attack(defense):
            found = pgd(defense, x, y, attack, 20, 2 / 255, start)
            with torch.no_grad():
                right["natural"] += int((defense(x).argmax(dim=1) == y).sum())
                right["white box"] += int((defense(found).argmax(dim=1) == y).sum())
    for column, count in right.items():
        low, high = wilson_interval(count, len(labels))
        assert low <= claimed(name, column) <= high, (column, count)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("dataset", "name", "epsilon"), [("digits", "dir", 0.15), ("cifar10", "small-dir", 8 / 255)])
def test_pyautoattack_finds_of_the_module_what_our_row_says(
    dataset: str, name: str, epsilon: float, request: pytest.FixtureRequest
) -> None:
    """RobustBench's way: the module as it is loaded, its draw fixed, under AutoAttack standard; image by image."""
    from pyautoattack import AutoAttack

    if dataset == "digits":
        test = load(DataConfig(name="digits"), 0).test
        images, labels = test.pixels(slice(24)), test.labels[:24]
    else:
        images, labels = cifar10(request.getfixturevalue("real_data"), 12)
    defense = dircluster.load_model(name, dataset, "Linf")
    spec = AttackSpec("autoattack", "fixed", epsilon=epsilon, label="autoattack-standard")
    settings = EvaluationConfig(images=len(labels), batch_size=24, steps=1, eot=1, draws=1)
    report = evaluate(defense, images, labels, epsilon=epsilon, settings=settings, attacks=[spec])
    ours = report.evaluation.right(spec)["fixed"][:, 0]

    module = defense.fixed(rng.entropy(0, "judgement/known"))
    seed = rng.entropy(0, "judgement/attack")
    with rng.seeded_torch_rng(seed, "autoattack"), under_attack(module):
        theirs: Any = AutoAttack(module, norm="Linf", eps=epsilon, seed=seed % 2**31, version="standard")
        found: Tensor = theirs.run_standard_evaluation(images, labels, batch_size=24)[0]
    with torch.no_grad():
        again = module(found).argmax(dim=1) == labels
    assert torch.equal(ours, again)
    assert 0 < int(ours.sum()) < len(ours)
