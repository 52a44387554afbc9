"""A row that is to be computed again: which one is meant, by which attack, and when it counts as the same."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import pytest
from torch import nn

from dircluster.cluster.commands import replay as command
from dircluster.cluster.tracking import registry
from dircluster.config import AttackConfig, ConfigError, EvaluationConfig, with_values
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.evaluation import Evaluation
from dircluster.evaluation.replay import Comparison, choose, read_rows, row_answers, spec_of
from dircluster.evaluation.results import Result, name_of
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.suites import SUITES, suite
from dircluster.evaluation.victim import VictimModel
from dircluster.presets import preset, run_to_plain

BALL = AttackSpec("pgd", "fixed", epsilon=0.1, steps=20, step_size=0.01)
TABLE = [BALL, dataclasses.replace(BALL, randomness="none", on="target", judged="target")]
RESULT = Result(
    defense="dir",
    attack="pgd20",
    randomness="fixed",
    accuracy=0.5,
    correct=50,
    judged=100,
    total=100,
    interval=(0.4, 0.6),
    draws=1,
    mean=0.5,
    worst=0.5,
    always=0.5,
    norm="linf",
    epsilon=0.1,
    steps=20,
    step_size=0.01,
    restarts=1,
    eot=1,
    loss="ce",
    average=1,
    sha256="a",
    protocol="deterministic white box",
)
ROW = dataclasses.asdict(RESULT)


def test_a_row_is_named_or_numbered() -> None:
    rows = [ROW | {"attack": "natural"}, ROW]
    assert name_of(ROW) == "dir/pgd20/fixed"
    assert choose(rows, "2") is choose(rows, "dir/pgd20/fixed") is rows[1]
    for wrong in ("0", "3", "-1", "pgd20", ""):
        with pytest.raises(ConfigError, match="there are 1 dir/natural/fixed, 2 dir/pgd20/fixed"):
            choose(rows, wrong)


def test_registered_models_are_fetched_into_no_storage_of_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "fetch", lambda uri, store: tmp_path / f"fetched from {store}" / uri[-1])
    run = with_values(preset("digits"), {"storage.uri": "/nowhere/runs", "tracking.uri": "http://registry"})
    facts = {"settings": run_to_plain(run), "defense": "models:/dir-digits/1", "surrogate_uri": "models:/target/2"}
    given = argparse.Namespace(defense=None, data=None, trust_code=False)
    _, spec = command._job_spec(facts, given)
    folder = f"{tmp_path}/fetched from http:/registry"
    assert (spec.defense, spec.surrogate) == (f"{folder}/1", f"{folder}/2")
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize("flag", ["--data", "--defense"])
def test_a_place_that_is_empty_is_not_that_of_the_report(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["nowhere.json", "1", flag, " "]) == 2
    assert capsys.readouterr().err == f"error: {flag} is empty: give a value, or leave it out\n"


def test_its_attack_is_that_of_the_plan() -> None:
    assert spec_of(ROW, TABLE, "dir") == BALL
    bare = {"defense": "none", "randomness": "none", "protocol": "deterministic"}
    assert spec_of(ROW | bare, TABLE, "dir") == TABLE[1]
    for changes, words in (
        ({"step_size": 0.02}, r"step size 0\.02, and this code's has 0\.01"),
        ({"judged": 200}, "judged 200, and this code's has 100"),
        ({"protocol": "Wor.Rob(10)"}, r"protocol Wor\.Rob\(10\), and this code's has deterministic white box"),
    ):
        with pytest.raises(ConfigError, match=words):
            spec_of(ROW | changes, TABLE, "dir")
    with pytest.raises(ConfigError, match=r"has epsilon 0\.2, and this code's has 0\.1"):
        spec_of(ROW | {"epsilon": 0.2}, TABLE, "dir")
    with pytest.raises(ConfigError, match="has no row dir/malt/fixed"):
        spec_of(ROW | {"attack": "malt"}, TABLE, "dir")


@pytest.mark.parametrize(
    ("changes", "to_the_bit", "holds"),
    [
        ({}, True, True),
        ({"sha256": "b"}, True, False),  # the same machine and code make the same images
        ({"sha256": "b"}, False, True),
        ({"accuracy": 0.52}, False, True),
        ({"accuracy": 0.53}, False, False),
        ({"sha256": None}, True, True),  # of which no row was kept: the accuracy decides
        ({"sha256": None, "accuracy": 0.51}, True, False),
    ],
)
def test_when_it_holds(changes: dict[str, object], to_the_bit: bool, holds: bool) -> None:
    assert Comparison(ROW | changes, RESULT, to_the_bit).holds == holds


@pytest.mark.parametrize(
    ("total", "away", "holds"), [(20, 2, True), (20, 3, False), (1000, 20, True), (1000, 21, False)]
)
def test_elsewhere_an_accuracy_may_be_two_points_away_and_two_images_at_the_least(
    total: int, away: int, holds: bool
) -> None:
    again = dataclasses.replace(RESULT, total=total)
    for sign in (1, -1):
        assert Comparison(ROW | {"accuracy": 0.5 + sign * away / total}, again, False).holds is holds


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"defense": None}, "defense"),
        ({"attack": 7}, "attack"),
        ({"accuracy": "0.5"}, "accuracy"),
        ({"accuracy": float("nan")}, "accuracy"),
        ({"judged": None}, "judged"),
        ({"total": 0}, "total"),
        ({"total": "100"}, "total"),
    ],
)
def test_a_row_that_says_too_little_is_refused_before_anything_is_computed(
    changes: dict[str, object], lacks: str, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    facts = dict.fromkeys(("defense", "digest", "data", "seed", "commit", "machine", "settings"), "x")
    for row in (ROW | changes, {name: value for name, value in ROW.items() if name not in changes}, "a row"):
        file.write_text(json.dumps({"rows": [ROW, row], "facts": facts}))
        with pytest.raises(ConfigError, match=f"row 2 does not say its {lacks if row != 'a row' else 'defense'}"):
            read_rows(file)


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    for text in ("{", "[]", '{"rows": [], "facts": {}}', '{"rows": 3, "facts": {}}'):
        file.write_text(text)
        with pytest.raises(ConfigError) as refusal:
            read_rows(file)
        assert "\n" not in str(refusal.value)
    facts = dict.fromkeys(("defense", "digest", "data", "seed", "commit", "machine"), "x")
    own = {"defense": "mine", "run": {}}
    file.write_text(json.dumps({"rows": [ROW], "facts": facts | {"settings": own}}))
    for words in ([], [str(file)], [str(file), "1", "--no"], [str(tmp_path / "no.json"), "1"], [str(file), "7"]):
        assert command.main(words) == 2
    assert command.main([str(file), "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "--trust-code" in lines[-1]
    (tmp_path / "planted.py").write_text("raise SystemExit('code of the report ran')")
    run = run_to_plain(with_values(preset("digits_smoke"), {"target.architecture": "planted:make"}))
    for settings in (run | {"defense": "none", "folder": str(tmp_path)}, run | {"folder": str(tmp_path)}):
        file.write_text(json.dumps({"rows": [ROW], "facts": facts | {"settings": settings}}))
        assert command.main([str(file), "1"]) == 2
        assert "--trust-code" in capsys.readouterr().err
        assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("name", SUITES)
def test_every_row_of_a_suite_finds_its_attack_again(name: str) -> None:
    settings = EvaluationConfig(images=4)
    specs = suite(name, AttackConfig(), settings, randomized=True, purifies=True, transfers=True, masked=True)
    for spec in specs:
        one = Evaluation([spec], 2, 0, 2, 4, MemoryStore(), VictimModel(nn.Flatten(), "dir"))
        form, each = ("fixed", 1) if row_answers(spec) == 1 else ("fresh", row_answers(spec))
        right = {form: ["1" * each, "0" * each]}
        one._read = {shard.name: {"right": right, "warnings": [], "sha256": ""} for shard in one.shards()}
        row = dataclasses.asdict(one.result(spec, "dir"))
        assert spec_of(row, specs, "dir") is spec
