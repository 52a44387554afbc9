"""Cells and their page: means over seeds beside the paper's numbers, failures as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dircluster.cluster.sweeps.store import key_of
from dircluster.reproduction.cells import STRONGEST, Outcome, cells_of, row_of
from dircluster.reproduction.page import Section, to_html, to_markdown
from dircluster.reproduction.pictures import Picture
from dircluster.reproduction.plan import Plan, make_plan
from dircluster.reproduction.tables import exhibits


def row(attack: str, accuracy: float, randomness: str = "none", **more: Any) -> dict[str, Any]:
    plain = {"defense": "dir", "attack": attack, "randomness": randomness, "accuracy": accuracy, "total": 100}
    plain |= {"norm": "linf", "epsilon": 0.0 if attack == "natural" else 0.1, "steps": 20, "step_size": 0.01}
    return {**plain, "restarts": 1, "eot": 1, "average": 1, "draws": 1, "protocol": "", **more}


ROWS = [
    row("natural", 0.99, defense="none"),
    row("natural", 0.90, "fixed"),
    row("pgd20", 0.60, "fixed"),
    row("natural", 0.91, "fresh"),
    row("pgd20", 0.62, "fresh", eot=8),
    row("bpda40-eot20", 0.64, "fresh", eot=20),
    row("bpda200-eot41", 0.40, "fresh", eot=41),
    row("malt30", 0.55, "fixed"),
    row("restored20-from-natural", 0.30, "fixed"),
    row("pgd20-wor10", 0.10, "fresh", protocol="Wor.Rob(10)"),
]


@pytest.mark.parametrize(
    ("column", "expected"),
    [("natural", 0.91), ("pgd20", 0.60), ("bpda40", 0.64), ("restored20-from-natural", 0.30), ("mifgsm20", None)],
)
def test_a_column_finds_its_row(column: str, expected: float | None) -> None:
    found = row_of(ROWS, column)
    assert (None if found is None else found["accuracy"]) == expected


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan([exhibits("cifar10")["ratio"]], "digits", {}, (0, 1), ("identity", "dir"), key_of)


def outcomes(plan: Plan) -> dict[str, Outcome]:
    """None 0.40 and 0.44 under PGD, ratio 0.3 fails at seed 1, ratio 0.5 at both, ratio 0.7 is ROWS."""
    made = {}
    for training in plan.trainings.values():
        ratio = training.run.masking.ratio if training.system.name == "dir" else 0.0  # type: ignore[attr-defined]
        rows = [row("natural", 0.80), row("pgd20", 0.40 + 0.04 * training.seed)] if ratio == 0 else ROWS
        fails = ratio == 0.5 or (ratio == 0.3 and training.seed == 1)
        made[training.key] = Outcome(error="no luck") if fails else Outcome(tuple(rows), commands=(training.name,))
    return made


def test_cells_are_means_beside_the_paper(plan: Plan) -> None:
    none, low, usual, high = cells_of(plan, plan.exhibits[0], outcomes(plan), "linf", comparable=True)
    assert [cell.column for cell in none] == ["natural", "pgd20", STRONGEST]
    pgd = none[1]
    assert pgd.found is not None
    assert pgd.found.values == (0.40, 0.44)
    assert pgd.found.mean == pytest.approx(0.42)
    assert pgd.found.deviation == pytest.approx(0.0283, abs=1e-4)
    assert pgd.found.interval == pytest.approx((0.328, 0.518), abs=1e-3)  # of 100 images
    assert pgd.difference == pytest.approx(42.0 - 45.72)
    assert high[1].gain == pytest.approx(60.0 - 42.0)
    assert high[1].printed_gain == pytest.approx(50.16 - 45.72)
    strongest = high[2].found
    assert strongest is not None
    assert (strongest.mean, strongest.attack) == (0.40, "bpda200-eot41, fresh")  # neither restored images nor Wor.Rob
    assert (usual[1].found, usual[1].error, usual[1].printed and usual[1].printed.value) == (None, "no luck", 54.27)
    assert low[1].found is not None
    assert (low[1].found.values, low[1].error) == ((0.60,), "no luck")


def test_numbers_of_other_data_are_not_subtracted(plan: Plan) -> None:
    cells = cells_of(plan, plan.exhibits[0], outcomes(plan), "linf", comparable=False)
    assert all(cell.difference is None for line in cells for cell in line)


@pytest.mark.parametrize(
    ("column", "changes", "own"),
    [
        ("pgd20", {}, True),
        ("pgd20", {"attack": "pgd5", "steps": 5}, False),
        ("pgd20", {"restarts": 5}, False),
        ("bpda40", {"attack": "bpda40-eot20", "steps": 40}, True),
        ("bpda40", {"attack": "bpda5-eot20", "steps": 5}, False),
        ("restored20-from-natural", {}, True),
        ("restored20-from-natural", {"attack": "restored5-from-natural", "steps": 5}, False),
        ("autoattack-standard", {"steps": 5000}, True),
        ("autoattack-standard", {"steps": 10}, False),
    ],
)
def test_what_another_attack_leaves_is_not_subtracted(column: str, changes: dict[str, Any], own: bool) -> None:
    plan = make_plan(
        [exhibits("cifar10")["table1"], exhibits("cifar10")["table3"]], "digits", {}, (0,), ("dir",), key_of
    )
    there = {key: Outcome((row(**{"attack": column, "accuracy": 0.5, **changes}),)) for key in plan.trainings}
    (found,) = (
        cell
        for exhibit in plan.exhibits
        if column in exhibit.columns
        for cell in cells_of(plan, exhibit, there, "linf", comparable=True)[0]
        if cell.column == column
    )
    assert found.found is not None
    assert found.printed is not None
    assert found.difference == (pytest.approx(50 - found.printed.value) if own else None)


def test_one_seed_of_another_attack_is_enough_for_no_difference(plan: Plan) -> None:
    there = outcomes(plan)
    for training in plan.trainings.values():
        if training.system.name == "identity" and training.seed == 1:
            there[training.key] = Outcome((row("pgd5", 0.44, steps=5),))
    pgd = cells_of(plan, plan.exhibits[0], there, "linf", comparable=True)[0][1]
    assert pgd.found is not None
    assert (pgd.found.values, pgd.difference) == ((0.40, 0.44), None)
    assert pgd.found.how == "eps 0.1, 20 steps of 0.01 / eps 0.1, 5 steps of 0.01"  # of all seeds


def test_the_strongest_is_compared_with_what_the_bare_target_met_too(plan: Plan) -> None:
    ended = outcomes(plan)
    longer = [row("natural", 0.8), row("pgd20", 0.5), row("bpda200-eot1", 0.45), row("autoattack-standard", 0.3)]
    bare = {unit.key for unit in plan.units(plan.exhibits[0], plan.exhibits[0].lines[0])}
    ended |= {key: Outcome(tuple(longer)) for key in bare}
    none, *_, high = cells_of(plan, plan.exhibits[0], ended, "linf", comparable=True)
    assert none[2].found is not None
    assert none[2].found.mean == 0.3
    assert high[2].gain == pytest.approx(40.0 - 45.0)  # BPDA, by whatever EOT; of ratio 0.7 there is no AutoAttack


def test_seeds_that_failed_are_told_and_gains_are_over_pairs(plan: Plan) -> None:
    """Ratio 0.3 ended at seed 0 alone, where the bare target has 40 %, not the 42 of both seeds."""
    cells = cells_of(plan, plan.exhibits[0], outcomes(plan), "linf", comparable=True)
    low = cells[1]
    assert (low[1].seeds, low[1].lacking, cells[0][1].lacking) == (2, True, False)
    assert low[1].gain == pytest.approx(60.0 - 40.0)
    grid = {line[0]: line[1:] for line in Section(plan.exhibits[0], cells).grid}
    assert grid["ratio 0.3"][1] == "60.0 (1 of 2 seeds) (paper 49.63)"
    assert grid["ratio 0.3"][2] == "40.0 (1 of 2 seeds) by bpda200-eot41, fresh"
    assert not any("seeds)" in text for text in grid["ratio 0.7"])
    evidence = Section(plan.exhibits[0], cells).evidence
    assert next(each for each in evidence if each["row"] == "ratio 0.3")["seeds"] == "91.0 (1 of 2 seeds)"


def test_seeds_of_which_no_two_ended_have_no_gain(plan: Plan) -> None:
    there = outcomes(plan)
    for training in plan.trainings.values():
        if training.system.name == "identity" and training.seed == 0:
            there[training.key] = Outcome(error="no luck")
    low = cells_of(plan, plan.exhibits[0], there, "linf", comparable=True)[1][1]
    assert low.found is not None
    assert low.gain is None


def test_a_mark_says_why_where_it_stands(plan: Plan) -> None:
    """A sign alone tells nobody what it is that makes an accuracy no evidence."""
    there = outcomes(plan)
    for training in plan.trainings.values():
        if training.system.name == "identity":
            marks = [{"kind": "constant", "share": 1.0, "seen_in": ""}] if training.seed == 1 else []
            there[training.key] = Outcome((row("pgd20", 0.10, marks=marks),))
    section = Section(plan.exhibits[0], cells_of(plan, plan.exhibits[0], there, "linf", comparable=True))
    assert section.grid[0][2] == "10.0 ± 0.0 ! (paper 45.72)"
    said = section.evidence[1]["how"]
    assert said.startswith("eps 0.1, 20 steps of 0.01 / eps 0.1, 20 steps of 0.01; marked: ")
    assert "one class for all natural images: 100.0 %" in said


def test_what_cannot_be_timed_is_a_failed_cell(plan: Plan) -> None:
    exhibit = replace(plan.exhibits[0], columns=("pgd20", "training time"))
    there = {key: replace(end, untimed={"training time": "no time"}) for key, end in outcomes(plan).items()}
    *_, high = cells_of(plan, exhibit, there, "linf", comparable=True)
    assert [cell.error for cell in high] == ["", "no time", ""]
    assert Section(exhibit, [high]).grid[0][2].startswith("failed")


def test_the_page_says_it_all(plan: Plan) -> None:
    cells = cells_of(plan, plan.exhibits[0], outcomes(plan), "linf", comparable=True)
    curve = {"": "natural, PGD", "0%": "12.5", "10%": "25.0"}
    section = Section(plan.exhibits[0], cells, Picture(b"png", {"discarded": [0.0, 0.1]}, "n = 8", [curve]))
    grid = {line[0]: line[1:] for line in section.grid}
    assert grid["None"][1] == "42.0 ± 2.8 (paper 45.72)"
    assert grid["ratio 0.5"] == ["failed (paper 85.11)", "failed (paper 54.27)", "failed"]
    markdown = to_markdown("Ratio", {"seeds": "0, 1"}, ["read it"], [section], [])
    html = to_html("Ratio", {"seeds": "0, 1"}, ["read it"], [section], [])
    seen = ("Section 4.3, CIFAR-10, ratio 0.7, column pgd20", "dir, ratio 0.7, seed 1", "32.8 to 51.8")
    for text in (*seen, "no luck", "n = 8"):
        assert text in markdown
        assert text in html
    for text in ("# ratio 0.7\n{0}dir, ratio 0.7, seed 0\n{0}dir, ratio 0.7, seed 1", "# None\n{0}identity, seed 0\n"):
        assert text.format("    ") in markdown  # commands under the row that they make
        assert text.format("") in html
    assert "](ratio.png)" in markdown
    assert "| natural, PGD | 12.5 | 25.0 |" in markdown
    assert "<td>natural, PGD</td><td>12.5</td>" in html
    assert "data:image/png;base64,cG5n" in html
    plain = json.loads(json.dumps(section.to_plain()))
    assert plain["cells"][1]["found"]["sd"] == pytest.approx(0.0283, abs=1e-4)
    assert plain["figure"] == {"discarded": [0.0, 0.1]}


def test_a_shortened_schedule_stands_in_every_cell(plan: Plan) -> None:
    """Of the table itself, of its evidence, and of the JSON; in words that a whole schedule does not have."""
    exhibit = replace(plan.exhibits[0], columns=("natural", "pgd20", "training time"))
    for factor, said in ((0.25, True), (1.0, False)):
        there = {key: replace(end, untimed={"training time": "no time"}) for key, end in outcomes(plan).items()}
        section = Section(exhibit, cells_of(replace(plan, factor=factor), exhibit, there, "linf", comparable=True))
        assert {"[schedules times 0.25]" in text for line in section.grid for text in line[1:]} == {said}
        assert {"schedules times 0.25" in each["how"] for each in section.evidence} == {said}
        assert {cell["factor"] for cell in section.to_plain()["cells"]} == {factor}
    assert section.grid[0][2] == "42.0 ± 2.8 (paper 45.72)"
