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


def test_a_card_describes_the_run_that_was_trained() -> None:
    card = (write_zoo.zoo.HERE / "cifar10-small-dir-alpha0" / "README.md").read_text()
    own = ["--dir.alpha", "0", "--training.precision", "bf16"]
    assert write_zoo.described(["cifar10_small", *own]) in card
    assert "alpha 0." in card
    assert f"seed 0, `{' '.join(own)}`;" in card
