"""The paper's tables as data: every number has its place, and none is told in two ways."""

from __future__ import annotations

import pytest

from dircluster.presets import preset
from dircluster.reproduction.exhibits import LABELS, MEASURED, Exhibit
from dircluster.reproduction.pictures import PICTURES
from dircluster.reproduction.printed import TABLE_3
from dircluster.reproduction.tables import NAMES, exhibits
from dircluster.training.costs import step_operations


def printed(exhibit: Exhibit) -> dict[tuple[str, str], float]:
    return {(line.label, column): each.value for line in exhibit.lines for column, each in line.printed.items()}


@pytest.mark.parametrize("data", ["cifar10", "svhn"])
@pytest.mark.parametrize("name", NAMES)
def test_every_printed_number_has_its_place(name: str, data: str) -> None:
    exhibit = exhibits(data)[name]
    assert len({line.label for line in exhibit.lines}) == len(exhibit.lines)
    assert exhibit.picture in ("", "sweep", *PICTURES)
    word = {"cifar10": "CIFAR-10", "svhn": "SVHN"}[data]
    for line in exhibit.lines:
        assert line.system.name in LABELS
        for column, each in line.printed.items():
            assert column in exhibit.columns
            assert each.where.startswith(("Table ", "Section 4."))
            assert word in each.where
            assert each.where.endswith(f"column {column}")
            assert 0 < each.value < 100 or column in MEASURED


def test_as_many_numbers_as_the_paper_prints() -> None:
    """Without those that a table repeats from Table 1, and with the two of Section 4.2 in Table 3."""
    count = {name: len(printed(exhibit)) for name, exhibit in exhibits("cifar10").items()}
    assert count["table1"] == len(printed(exhibits("svhn")["table1"])) == 30
    assert (count["table2"], count["table3"], count["table4"]) == (36, 4 + 3, 6)
    assert count["table5"] - 2 == 12
    assert count["ratio"] - 2 == 6
    assert count["no-pretrain"] - 2 - 2 == 2
    assert all(not printed(exhibit) for name, exhibit in exhibits("svhn").items() if name != "table1")


def test_some_of_them_as_the_paper_prints_them() -> None:
    there = exhibits("cifar10")
    assert printed(there["table1"])["DIR", "autoattack-standard"] == 51.34
    assert printed(there["table2"])["MART: NRP", "autoattack-standard"] == 16.91
    assert printed(there["table3"])["JATP, our reconstruction", "restored20-from-natural"] == 26.79
    assert printed(there["table4"])["DIR", "ms an epoch"] == 527_000
    assert printed(there["table5"])["12 + 4", "pgd20"] == 54.32
    assert printed(there["ratio"])["ratio 0.7", "natural"] == 77.68
    assert printed(there["fig6a"])["alpha 2", "natural"] == 85.11


def test_the_note_on_the_times_of_table_4_has_the_ratios_that_are_counted() -> None:
    stages = {"cifar10_hgd": "hgd", "cifar10_hgd_a": "hgd_a", "cifar10_jatp": "jatp", "cifar10": "dir"}
    hgd, hgd_a, jatp, dir_ = (step_operations(preset(name), stage) for name, stage in stages.items())
    note = " ".join(exhibits("cifar10")["table4"].notes)
    assert f"as 1 : {jatp / hgd:.1f} : {dir_ / hgd:.1f}, or as 1.0 : {jatp / hgd_a:.1f} : {dir_ / hgd_a:.1f} if" in note


def test_the_presets_print_the_same() -> None:
    for name, (defense, attack) in {
        "menet": ("menet", "bpda40"),
        "menet_a": ("menet", "bpda40"),
        "ebm": ("ebm", "bpda40"),
    }.items():
        assert preset(f"cifar10_{name}").printed[defense][attack] == TABLE_3[name]
    assert preset("cifar10").printed["dir"]["bpda40"] == TABLE_3["dir"]


def test_jatp_is_called_what_it_is_in_every_row() -> None:
    lines = [line for data in ("cifar10", "svhn") for exhibit in exhibits(data).values() for line in exhibit.lines]
    jatp = [line for line in lines if line.system.name == "jatp"]
    assert len(jatp) == 2 * (1 + 2 + 1 + 1)
    assert all(line.label.endswith("JATP, our reconstruction") for line in jatp)
    assert {printed.where.partition(",")[0] for line in jatp for printed in line.printed.values()} >= {"Table 1"}
    assert not any("reconstruction" in each.where for line in jatp for each in line.printed.values())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("table2", "Ding et al. 2019"),
        ("table1", "Eq. 6, the cross-entropy in DIR's loss, lacks its minus sign"),
        ("fig4", "Figure 3.3"),
        ("table1", "which HGD and NRP do not have"),
        ("table4", "which is not what JATP is"),
        ("table4", "trained over the natural target or transferred"),
        ("table1", "VNI-FGSM's neighbors and their distance (20 within 1.5 radii here)"),
        ("table5", "of how many steps its PGD is"),
        ("fig2", "the first 256 test images, at the first seed"),
    ],
)
def test_slips_of_the_paper_are_noted(name: str, said: str) -> None:
    assert any(said in note for note in exhibits("cifar10")[name].notes)


def test_both_controls_are_in_every_table() -> None:
    for name, exhibit in exhibits("cifar10").items():
        systems = {line.system.name for line in exhibit.lines}
        assert "identity" in systems, name
        assert exhibit.picture not in ("", "sweep") or "finetune" in systems, name
