"""The bits of the smoke runs and the words of the command line stay what they are, whatever is moved or renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import write


def different(what: str, name: str) -> str:
    return f"{what} changed; where that is meant, write it again ({write.COMMAND} {name}) and say why in the commit"


PROOFS = ("cifar10_joint_smoke", "imagenet_smoke")
"""What the other runs are made of, in other company: with `make proofs`."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in PROOFS else name for name in write.RUNS]
)
def test_a_run_computes_what_it_did(name: str, tmp_path: Path) -> None:
    file = write.FOLDER / f"{name}.json"
    if not file.is_file():
        there = sorted(folder.name for folder in write.HERE.glob("torch-*"))
        pytest.skip(f"no golden file of {name} for torch {torch.__version__}; there are {', '.join(there)}")
    if write.RUNS[name].cifar10 and write.find_data() is None:
        pytest.skip("no parquet data: set DIRCLUSTER_DATA to a folder with cifar10/")
    golden, here = json.loads(file.read_text()), write.arithmetic()
    found: dict[str, Any] = json.loads(write.to_json(write.observe(name, tmp_path)))
    assert write.keys_without_weights(name, found) == write.keys_without_weights(name, golden), different("key", name)
    if golden["arithmetic"] != here:
        pytest.skip(f"weights and rows of {name} are those of {golden['arithmetic']}, this machine is {here}")
    for part in (golden.keys() | found.keys()) - {"arithmetic"}:
        assert found.get(part) == golden.get(part), different(f"{part} of {name}", name)


def test_settings_and_help_say_what_they_did(tmp_path: Path) -> None:
    golden = {file.name: file.read_text(encoding="utf-8") for file in write.COMMANDS.iterdir()}
    found = write.texts(tmp_path)
    assert set(found) == set(golden)
    for name, text in found.items():
        assert text == golden[name], different(name, "commands")


def test_a_sum_of_other_bits_is_another_sum() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert write.sha256(tensors) == write.sha256(dict(reversed(tensors.items())))
    assert write.sha256(tensors) != write.sha256(tensors | {"a": torch.tensor([0.0, -0.0])})
    assert write.sha256(tensors) != write.sha256({"a": torch.zeros(2), "c": torch.ones(1)})


def test_a_later_column_counts_where_it_says_something_else() -> None:
    rows = [{"n": "fp32", "crafting": "fp32"}, {"n": 1, "crafting": "bf16"}]
    assert write.as_written(rows) == [{"n": "fp32"}, {"n": 1, "crafting": "bf16"}]


def test_golden_files_are_read_back(tmp_path: Path) -> None:
    found = {"a": {"b": [1.5, "x"]}, "rows": [{"n": 1}, {"n": 2}], "empty": []}
    assert json.loads(write.to_json(found)) == found
