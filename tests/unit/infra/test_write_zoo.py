"""What the zoo's cards say of a training and of its target."""

from __future__ import annotations

from pathlib import Path

import pytest

from dircluster.config import ConfigError
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
        ("dir-alpha0", "cifar10_small", "--dir.alpha 0 --training.precision bf16"),
        ("finetune", "cifar10_small_finetune", "--target.uri zoo:cifar10-small-at --training.precision bf16"),
    ],
)
def test_a_card_describes_the_run_that_was_trained(name: str, preset: str, own: str) -> None:
    card = (write_zoo.zoo.HERE / f"cifar10-small-{name}" / "README.md").read_text()
    assert write_zoo.described([preset, *own.split()]) in card
    assert f"seed 0, `{own}`;" in card
    assert "alpha 2" not in card
