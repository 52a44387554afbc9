"""The champion is earned: what moves the alias, and what the line says."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from dircluster.cluster.tracking import registry as registered
from dircluster.cluster.tracking.champion import CANDIDATE, CHAMPION, crown, evidence_of, note
from dircluster.evaluation.results import headline


class Registry:
    """In place of MLflow's: versions of one name, with tags and aliases."""

    def __init__(self) -> None:
        self.versions: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        self.is_away = False

    def add(self) -> Any:
        number = str(len(self.versions) + 1)
        self.versions[number] = SimpleNamespace(name="dir-x", version=number, tags={})
        self.aliases[CANDIDATE] = number
        return self.versions[number]

    def set_model_version_tag(self, name: str, number: str, tag: str, value: str) -> None:
        self.versions[number].tags[tag] = value

    def get_model_version(self, name: str, number: str) -> Any:
        return self.versions[number]

    def set_registered_model_alias(self, name: str, alias: str, number: str) -> None:
        self.aliases[alias] = number

    def get_model_version_by_alias(self, name: str, alias: str) -> Any:
        if self.is_away:
            raise MlflowException("API request failed: too many 503 error responses")
        if alias not in self.aliases:
            raise MlflowException("no such alias", INVALID_PARAMETER_VALUE)
        return self.versions[self.aliases[alias]]


def row(attack: str, accuracy: float, **more: Any) -> dict[str, Any]:
    usual = {"defense": "dir", "attack": attack, "accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.05]}
    return usual | {"epsilon": 0.1, "norm": "linf", "average": 1, "total": 100, "sample": None} | more


def judged(registry: Registry, version: Any, robust: float, flags: int | None = None, **more: Any) -> str:
    rows = [row("pgd20", robust + 0.1, **more), row("pgd20-eot8", robust, **more), row("natural", 0.9, epsilon=0.0)]
    rows += [row("pgd20", 0.0, defense="none"), row("l2", 0.0, norm="l2"), row("restored20", 0.0)]
    found = evidence_of(rows, "linf", "data", flags)
    assert found is not None
    return crown(registry, note(registry, version, found))  # type: ignore[arg-type]


def test_the_first_is_champion_and_the_better_one_follows() -> None:
    registry = Registry()
    assert judged(registry, registry.add(), 0.5) == "version 1 is champion: there was none; no verdict was asked"
    assert judged(registry, registry.add(), 0.55).startswith("version 2 stays candidate: its lower bound 50.0 %")
    assert judged(registry, registry.add(), 0.56) == (
        "version 3 is champion: its lower bound 51.0 % (pgd20-eot8) is above the 50.0 % (pgd20-eot8) of version 1,"
        " on the same 100 images; no verdict was asked"
    )
    assert judged(registry, registry.versions["3"], 0.56).startswith("version 3 is champion already")
    assert registry.aliases == {CHAMPION: "3", CANDIDATE: "3"}


def test_a_champion_that_cannot_be_asked_for_is_not_replaced() -> None:
    registry = Registry()
    judged(registry, registry.add(), 0.9)
    registry.is_away = True
    with pytest.raises(MlflowException, match="503"):
        judged(registry, registry.add(), 0.1)
    assert registry.aliases[CHAMPION] == "1"


def test_a_flag_keeps_it_back() -> None:
    registry = Registry()
    line = judged(registry, registry.add(), 0.5, flags=2)
    assert line == "version 1 stays candidate: the verdict flags 2 questions of it"
    assert CHAMPION not in registry.aliases
    judged(registry, registry.add(), 0.5, flags=0)
    assert registry.aliases[CHAMPION] == "2"
    assert judged(registry, registry.versions["2"], 0.5).endswith("already")  # the verdict of before stays
    judged(registry, registry.add(), 0.9, flags=1)
    assert judged(registry, registry.versions["3"], 0.9).startswith("version 3 stays candidate: the verdict flags 1 q")
    assert registry.aliases[CHAMPION] == "2"


def test_other_images_or_attacks_are_no_comparison() -> None:
    registry = Registry()
    judged(registry, registry.add(), 0.5)
    for changed in ({"total": 50}, {"sample": 7}, {"steps": 5}):
        line = judged(registry, registry.add(), 0.9, **changed)
        assert "no evaluation has judged it and version 1, the champion, on the same images" in line
    assert judged(registry, registry.versions["1"], 0.4, total=50).startswith("version 1 is champion already")
    assert judged(registry, registry.versions["2"], 0.9, total=50).startswith("version 2 is champion")


def test_what_a_later_release_notes_besides_is_not_read() -> None:
    registry = Registry()
    judged(registry, registry.add(), 0.5)
    tags = registry.versions["1"].tags
    for name, text in tags.items():
        tags[name] = json.dumps(json.loads(text) | {"kelvin": 300})
    assert judged(registry, registry.add(), 0.56).startswith("version 2 is champion: its lower bound 51.0 %")


def test_no_attack_is_no_evidence() -> None:
    assert evidence_of([row("natural", 0.9, epsilon=0.0)], "linf", "data") is None


def test_a_row_that_may_flatter_earns_nothing() -> None:
    registry, marked = Registry(), [{"kind": "slope", "share": 0.5}]
    line = judged(registry, registry.add(), 0.5, marks=marked)
    assert line == "version 1 stays candidate: its strongest row, pgd20-eot8, is marked: it may flatter"
    assert judged(registry, registry.add(), 0.4, marks=[]).startswith("version 2 is champion: there was none")
    assert judged(registry, registry.add(), 0.9, marks=marked).startswith("version 3 stays candidate: its strongest")
    line = judged(registry, registry.versions["2"], 0.4, marks=marked)
    assert line.startswith("version 2 is champion already, although its strongest row, pgd20-eot8, is marked")
    line = judged(registry, registry.add(), 0.3, marks=[])  # nor does it keep others from being champion
    assert line.startswith("version 4 is champion: the strongest row of version 2, pgd20-eot8, is marked")


def test_images_of_other_data_are_no_comparison() -> None:
    keys = [evidence_of([row("pgd20", 0.5)], "linf", data) for data in ("data", "data", "other data")]
    assert keys[0] == keys[1]
    assert keys[0] is not None
    assert keys[2] is not None
    assert keys[0][0] != keys[2][0]


@pytest.mark.parametrize("weak", [50, 100])
def test_all_that_has_judged_both_counts(weak: int) -> None:
    registry = Registry()

    def noted(version: Any, **robust: float) -> str:
        for total in (50, 100):
            found = evidence_of([row("pgd20", robust[f"of{total}"], total=total)], "linf", "data")
            assert found is not None
            note(registry, version, found)  # type: ignore[arg-type]
        return crown(registry, version)  # type: ignore[arg-type]

    noted(registry.add(), of50=0.5, of100=0.5)
    assert registry.aliases[CHAMPION] == "1"
    line = noted(registry.add(), **({"of50": 0.9, "of100": 0.9} | {f"of{weak}": 0.4}))
    assert line.startswith("version 2 stays candidate: its lower bound 35.0 %")
    assert noted(registry.add(), of50=0.9, of100=0.9).startswith("version 3 is champion")


def test_what_defenses_are_ranked_by() -> None:
    rows = [row("natural", 0.95, epsilon=0.0, defense="none"), row("pgd20", 0.1, defense="none")]
    rows += [
        row("natural", 0.9, epsilon=0.0),
        row("pgd20", 0.6, marks=[{}]),
        row("malt", 0.5),
        row("l2", 0.1, norm="l2"),
    ]
    found = {"natural_accuracy": 0.9, "robust_accuracy": 0.5, "robust_accuracy_low": 0.45, "marked_rows": 1.0}
    assert headline(rows, "linf") == found
    assert headline(rows[2:3], "linf") == {"natural_accuracy": 0.9}


@pytest.mark.parametrize(
    ("dataset", "threat", "found"),
    [("cifar10", "Linf", "models:/dir-x@champion"), ("cifar10", "L2", None), ("svhn", "Linf", None)],
)
def test_a_champion_is_found_for_its_data_set_and_threat_alone(
    dataset: str, threat: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry()
    registry.add().tags |= {registered.DATASET_TAG: "cifar10", registered.THREAT_TAG: "Linf"}
    registry.aliases[CHAMPION] = "1"
    client: Any = SimpleNamespace(
        search_registered_models=lambda text: ["dir-x"] if "'dir-x'" in text else [],
        get_model_version_by_alias=registry.get_model_version_by_alias,
    )
    monkeypatch.setattr(registered, "MlflowClient", lambda uri: client)
    assert registered.find_champion(["dir", "dir-x"], dataset, threat, "http://registry") == found
