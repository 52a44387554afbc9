"""What travels with a registered model: its code, and the versions of what it imports."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dircluster.cluster.tracking.packaging import pack
from dircluster.presets import preset


def test_this_package_travels_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    code, requirements = pack(preset("digits"), tmp_path)
    assert code == [str(tmp_path / "dircluster")]
    assert (tmp_path / "dircluster" / "training" / "export.py").is_file()
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".safetensors", ".pyc")]
    assert [line.partition("==")[0] for line in requirements] == ["torch", "numpy", "safetensors"]
    assert requirements[0] == f"torch=={torch.__version__.partition('+')[0]}"


def test_somebodys_own_target_travels_with_its_defense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, packed = tmp_path / "own", tmp_path / "packed"
    own.mkdir()
    packed.mkdir()
    (own / "their_targets.py").write_text("")
    monkeypatch.chdir(own)
    digits = preset("digits")
    for architecture, paths, more in (
        ("their_targets:make", ["dircluster", "their_targets.py"], []),
        ("timm:resnet10t", ["dircluster"], ["timm"]),
        ("torchvision.models:resnet18", ["dircluster"], ["torchvision"]),
    ):
        run = dataclasses.replace(digits, target=dataclasses.replace(digits.target, architecture=architecture))
        (place := packed / architecture.partition(":")[0]).mkdir()
        code, requirements = pack(run, place)
        assert [Path(each).name for each in code] == paths
        assert [line.partition("==")[0] for line in requirements[3:]] == more


@pytest.mark.long
def test_the_packed_code_loads_a_defense_by_itself(tmp_path: Path) -> None:
    pack(preset("digits"), tmp_path)
    script = "import dircluster.training.export as e, sys; print(e.__file__); print('ray' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [str(tmp_path / "dircluster" / "training" / "export.py"), "False"], done.stderr
