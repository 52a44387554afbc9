"""A defense of the user's own, by dotted path: the worked example of the docs, trained, evaluated, loaded, refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dircluster
from dircluster.cluster.commands import benchmark, evaluate
from dircluster.cluster.commands import train as train_command
from dircluster.training.checkpoint import CheckpointError
from tests.conftest import ROOT

NAME = "mypackage.smooth"
QUIET = ("--tracking.no-enabled", "--scaling.device", "cpu", "--scaling.threads", "1")
LOCAL = ("--launcher", "local", *QUIET)


def example() -> str:
    """The module that the docs show in full."""
    pattern = re.compile(r"```python\n(# mypackage/smooth\.py\n.*?)```", re.DOTALL)
    (found,) = (text for file in sorted((ROOT / "docs").glob("*.md")) for text in pattern.findall(file.read_text()))
    return str(found)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the example in it; what is imported from it is forgotten afterwards."""
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "smooth.py").write_text(example())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "mypackage":
            del sys.modules[name]


def summary(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "s.json").read_text())
    return found


def test_it_is_trained_evaluated_and_loaded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tiny", "--defense", NAME, *LOCAL, "--summary", "s.json"]
    assert train_command.main(words) == 0, capsys.readouterr().err
    trained, said = summary(place), capsys.readouterr().out
    assert (trained["preset"], trained["defense"]) == ("tiny", NAME)
    assert {row["defense"] for row in trained["results"]} == {"none", NAME}
    folder = trained["checkpoint"]
    assert f"jobs/evaluate.py {NAME}:tiny --trust-code" in said

    assert train_command.main(words) == 0
    assert "smooth: reused from" in capsys.readouterr().out

    with pytest.raises(CheckpointError, match=f"wants to import '{NAME}'.*trust_code=True"):
        dircluster.load_defense(folder)
    defense = dircluster.load_defense(folder, trust_code=True)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(defense(images), defense(images))
    assert defense.purifier(images).shape == images.shape

    words = [f"{NAME}:tiny", *LOCAL, "--defense", folder, "--summary", "s.json"]
    assert evaluate.main(words) == 2
    assert "say that its code is trusted" in capsys.readouterr().err
    assert evaluate.main([*words, "--trust-code"]) == 0
    assert "evaluation: reused from" in capsys.readouterr().out
    assert summary(place)["results"] == trained["results"]

    file = place / "mypackage" / "smooth.py"  # another purifier: what the old one was found to do says nothing of it
    file.write_text(file.read_text() + "\n\nMORE = 1\n")
    forget_digests()
    assert evaluate.main([*words, "--trust-code"]) == 0
    assert "evaluation: reused from" not in capsys.readouterr().out


def forget_digests() -> None:
    from dircluster.evaluation import provenance

    provenance.code_digest.cache_clear()


def test_a_process_that_has_not_imported_it_evaluates_it(place: Path, train: Any) -> None:
    """As workers do: the module is found in the current folder."""
    done = train("tiny", "--defense", NAME, *LOCAL)
    assert done.code == 0, done.err
    words = ("--defense", done.summary["checkpoint"], "--trust-code", "--evaluation.steps", "1")
    again = train("digits_smoke", *LOCAL, *words, script="evaluate")  # a preset of another defense of these images
    assert again.code == 0, again.err
    assert {row["defense"] for row in again.summary["rows"]} == {"none", NAME}


@pytest.mark.slow
def test_ray_workers_import_it(place: Path, train: Any) -> None:
    done = train("tiny", "--defense", NAME, *QUIET, "--scaling.workers", "2")
    assert done.code == 0, done.err
    words = (f"{NAME}:tiny", *QUIET, "--defense", done.summary["checkpoint"], "--trust-code", "--evaluation.steps", "1")
    again = train(*words, script="evaluate")
    assert again.code == 0, again.err
    (place / "space.py").write_text('GRID = {"smooth.kernel": [1, 3]}\n')
    swept = train("tiny", "--defense", NAME, *QUIET, "--space", "space.py", script="tune")
    assert swept.code == 0, swept.err
    assert {trial["status"] for trial in swept.summary["trials"]} == {"FINISHED"}


def test_a_step_of_it_is_timed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["tiny", "--defense", NAME, *QUIET, "--steps", "1"]) == 0
    assert "GFLOP a step" in capsys.readouterr().out
