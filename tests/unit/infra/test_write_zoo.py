"""What the zoo's cards say of a target."""

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
