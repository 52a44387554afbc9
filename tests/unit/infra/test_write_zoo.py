"""What the zoo's cards say of a training and of its target."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from dircluster import cli
from dircluster.config import ConfigError, to_dict
from dircluster.defenses.table import find_defense
from dircluster.presets import preset
from infra import write_zoo

AT = "zoo:cifar10-small-at"


@pytest.mark.parametrize(
    "words", [["--target.uri", AT], [f"--target.uri={AT}"], ["--dir.alpha", "0", "--target.uri", AT]]
)
def test_a_card_names_the_target_that_a_training_was_given(words: list[str]) -> None:
    assert write_zoo.shipped_target(words, "cifar10") == "cifar10-small-at"


def test_no_card_names_a_target_that_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_zoo.shipped_target([], "digits") == "digits-at"
    for words in ([], ["--target.uri", "weights.pt"], ["--target.uri"], ["--target.uri", "zoo:none"]):
        with pytest.raises(ConfigError):
            write_zoo.shipped_target(words, "cifar10")
    assert write_zoo.main(["mine", str(tmp_path), "--preset", "cifar10"]) == 2
    assert "error: its target is not in the zoo: give --target NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "preset", "own"),
    [
        ("dir-alpha0", "cifar10_small", f"--dir.alpha 0 --training.precision bf16 --target.uri {AT}"),
        ("finetune", "cifar10_small_finetune", f"--target.uri {AT} --training.precision bf16"),
    ],
)
def test_a_card_describes_the_run_that_was_trained(name: str, preset: str, own: str) -> None:
    card = (write_zoo.zoo.HERE / f"cifar10-small-{name}" / "README.md").read_text()
    assert write_zoo.described([preset, *own.split()]) in card
    assert f"seed 0, `{own}`;" in card
    assert "alpha 2" not in card


def test_a_claim_has_the_settings_of_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def judged(words: list[str], uri: str) -> dict[str, Any]:
        asked.append(words)
        run = cli.parse(cli.EvaluateJob, words).run
        facts = {"commit": "c", "machine": "m", "settings": {"run": to_dict(run)}}
        return {"facts": facts, "rows": []}

    monkeypatch.setattr(write_zoo, "judged", judged)
    monkeypatch.setattr(write_zoo, "rounded", lambda folder, into, made: "0" * 64)
    monkeypatch.setattr(write_zoo, "CLAIMS", tmp_path / "claims")
    monkeypatch.setattr(write_zoo.zoo, "HERE", tmp_path)
    own = "--dir.alpha 0 --target.objective trades --attack.epsilon 0.1 --seed 0"
    assert write_zoo.main(["mine", "final", "--preset", "digits", "--with", own, "--evaluation.images", "8"]) == 0
    run = cli.parse(cli.EvaluateJob, asked[0]).run
    assert (run.target.objective, run.attack.epsilon, run.evaluation.images) == ("trades", 0.1, 8)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "epsilon 0.1;" in card
    assert "alpha 0." in card


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("digits-dir", "digits-at", ""),
        ("cifar10-small-hgd", None, f"--target.uri {AT} --training.precision bf16"),
        ("cifar10-small-finetune", None, f"--target.uri {AT} --training.precision bf16"),
        ("cifar10-small-dir-alpha0", None, f"--dir.alpha 0 --training.precision bf16 --target.uri {AT}"),
    ],
)
def test_what_is_judged_again_is_judged_as_it_was_trained(name: str, target: str | None, words: str) -> None:
    given = argparse.Namespace(name=name, target=None)
    write_zoo.remembered(given)
    assert (given.target, given.settings_of_training) == (target, words)
    assert given.seed == 0
    assert given.trained
    assert find_defense(preset(given.preset).defense)


@pytest.mark.parametrize("name", ["cifar10-dir", "digits-at", "nothing"])
def test_nothing_else_is_judged_again(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_zoo.main([name]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_new_one_needs_its_preset(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        write_zoo.main(["mine", str(tmp_path)])
