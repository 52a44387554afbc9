"""Suites as plain data: what a reader compares with what."""

from __future__ import annotations

from typing import Any

import pytest

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.suites import suite
from dircluster.reproduction.cells import row_of

KINDS: list[dict[str, Any]] = [
    {"randomized": True, "purifies": True, "transfers": True, "masked": True},
    {"randomized": True, "purifies": True, "transfers": True, "masked": False},
    {"randomized": False, "purifies": True, "transfers": True, "masked": False},
    {"randomized": False, "purifies": False, "transfers": False, "masked": False},
]


def paper(kind: dict[str, Any], attack: AttackConfig | None = None, **settings: Any) -> list[AttackSpec]:
    """Rows of ``paper`` that the defense is judged by."""
    made = suite("paper", attack or AttackConfig(), EvaluationConfig(suite="paper", **settings), **kind)
    return [spec for spec in made if spec.judged == "defense"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_pgd_20_has_left_is_found_in_small_steps(kind: dict[str, Any]) -> None:
    rows = {spec.name: spec for spec in paper(kind) if spec.randomness != "fresh"}
    short, converged = rows["pgd20"], rows["pgd100"]
    assert converged.randomness == short.randomness
    assert (short.steps, short.step_size) == (20, 2 / 255)
    assert (converged.steps, converged.step_size) == (100, pytest.approx(0.2 / 255))
    assert paper(kind).index(converged) == paper(kind).index(short) + 1


@pytest.mark.parametrize(
    ("attack", "size"),
    [
        (AttackConfig(step_size=0.1 / 255), 0.1 / 255),  # smaller already
        (AttackConfig(step_size=4 / 255), 0.2 / 255),
        (AttackConfig(norm="l2", epsilon=0.5), 0.0125),
    ],
)
def test_its_steps_are_never_larger_than_those_that_were_asked_for(attack: AttackConfig, size: float) -> None:
    (converged,) = (spec for spec in paper(KINDS[2], attack) if spec.name == "pgd100")
    assert converged.step_size == pytest.approx(size)


def test_where_all_attacks_are_to_have_as_many_steps_it_has_no_second_meaning() -> None:
    for steps in (20, 100):
        named = [spec for spec in paper(KINDS[0], steps=steps) if spec.name == f"pgd{steps}"]
        assert [(spec.randomness, spec.step_size) for spec in named] == [("fixed", 2 / 255), ("fresh", 2 / 255)]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_what_averages_its_draws_is_judged_so_beside_what_answers_by_one(kind: dict[str, Any]) -> None:
    rows = {spec.name: spec for spec in paper(kind) if spec.randomness == "fresh"}
    natural, bpda, single = rows["natural-mean-of-10"], rows["bpda40-mean-of-10"], rows["bpda40-eot20"]
    assert (single.average, single.eot, single.draws) == (1, 20, 20)
    assert (bpda.attack, bpda.average, bpda.eot, bpda.draws) == ("bpda", 10, 10, 5)
    assert (bpda.steps, bpda.step_size, bpda.epsilon) == (single.steps, single.step_size, single.epsilon)
    assert natural == bpda.control("natural")
    few = {spec.name: spec for spec in paper(kind, eot=2)}["bpda40-mean-of-10"]  # few chains attack, many judge
    assert (few.eot, few.average) == (2, 10)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_what_draws_nothing_has_nothing_to_average(kind: dict[str, Any]) -> None:
    assert {spec.average for spec in paper(kind)} == {1}


def test_tables_of_the_paper_show_pgd_20_beside_its_number() -> None:
    rows = [{"defense": "dir", "attack": spec.name, "randomness": spec.randomness} for spec in paper(KINDS[0])]
    found = row_of(rows, "pgd20")
    assert found is not None
    assert (found["attack"], found["randomness"]) == ("pgd20", "fixed")


@pytest.mark.parametrize("kind", KINDS)
def test_autoattack_is_asked_of_every_kind_and_of_the_bare_target(kind: dict[str, Any]) -> None:
    made = suite("autoattack", AttackConfig(), EvaluationConfig(suite="autoattack"), **kind)
    attacks = {(spec.judged, spec.name): spec for spec in made}
    unknown = kind["randomized"] and not kind["masked"]  # what it draws cannot be held
    own = attacks["defense", "autoattack-rand" if unknown else "autoattack-standard"]
    assert own.randomness == ("fresh" if unknown else "fixed" if kind["randomized"] else "none")
    assert len([spec for spec in made if spec.attack == "autoattack"]) == 1 + kind["purifies"]
    if kind["purifies"]:
        assert attacks["target", "autoattack-standard"].randomness == "none"
    if kind["randomized"]:
        fresh = {spec.name: spec for spec in made if spec.randomness == "fresh"}
        assert (fresh["pgd20"].eot, fresh["pgd20"].draws) == (20, 20)
