"""What --defense may be: a folder, its stage's, a factory in a module or a file, or a line with the way out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from dircluster.cluster.loading import JobSpec, finished, load_module, located
from dircluster.config import ConfigError
from dircluster.defenses.base import Defended
from dircluster.defenses.table import find_defense
from dircluster.presets import run_to_plain
from dircluster.presets.dir import DirRun
from dircluster.training import checkpoint, hub_folder


def test_a_factory_in_a_file_is_made(smoke: DirRun, tmp_path: Path) -> None:
    (tmp_path / "my_defense_file.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    name, folder = located(f"{tmp_path}/my_defense_file.py:make")
    assert (name, folder) == ("my_defense_file:make", str(tmp_path))
    assert not load_module(JobSpec(run_to_plain(smoke), name, folder), smoke).training


@pytest.mark.parametrize(
    ("given", "message"),
    [("nowhere.py:make", "nowhere.py does not exist"), ("not-a-name.py:make", "'not-a-name' cannot be imported")],
)
def test_files_that_hold_no_factory(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("not-a-name.py").touch()
    with pytest.raises(ConfigError, match=message):
        located(given)


@pytest.mark.parametrize("name", ["json", "torch", "sys", "random"])
def test_a_file_of_the_name_of_another_module_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("def make(): ...\n")
    with pytest.raises(ConfigError, match=rf"'{name}' is the name of another module \(.*\); rename yours$"):
        located(f"{tmp_path}/{name}.py:make")


def test_a_file_that_imports_what_lies_beside_it_is_a_module_of_its_package(smoke: DirRun, tmp_path: Path) -> None:
    inner = tmp_path / "my_outer_package" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    (inner.parent / "sizes.py").write_text("CLASSES = 10\n")
    (inner / "relative.py").write_text(
        "import torch\nfrom ..sizes import CLASSES\n"
        "def make():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, CLASSES))\n"
    )
    name, folder = located(f"{inner}/relative.py:make")
    assert (name, folder) == ("my_outer_package.inner.relative:make", str(tmp_path))
    assert not load_module(JobSpec(run_to_plain(smoke), name, folder), smoke).training
    assert located(f"{inner}/relative.py:make") == (name, folder)  # now that it is imported


@pytest.mark.parametrize(
    ("text", "message"),
    [("def (:", "SyntaxError: invalid"), ("raise SystemExit(3)", "SystemExit: 3"), ("make = exit", "SystemExit: None")],
)
def test_a_factory_that_fails_is_told_in_a_line(text: str, message: str, smoke: DirRun, tmp_path: Path) -> None:
    (tmp_path / "failing_defense.py").write_text(text)
    with pytest.raises(ConfigError, match=f"^--defense failing_defense:make: {message}.*$"):
        load_module(JobSpec(run_to_plain(smoke), "failing_defense:make", str(tmp_path)), smoke)
    sys.modules.pop("failing_defense", None)


LOOSE = """
import torch
from torch import nn
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
class Silent(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
class Place:
    @staticmethod
    def make():
        torch.set_default_dtype(torch.float64)
        return Silent(nn.Flatten(), nn.Linear(64, 10, dtype=torch.float32))
def exported():
    sizes = ({0: torch.export.Dim("images")},)
    return torch.export.export(network.eval(), (torch.rand(3, 1, 8, 8),), dynamic_shapes=sizes).module()
def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
def meta():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10, device="meta"))
"""


@pytest.mark.parametrize("name", ["network", "Place.make", "exported"])
def test_what_somebodys_module_holds_is_judged_in_eval_mode(name: str, smoke: DirRun, tmp_path: Path) -> None:
    file = tmp_path / f"loose_{name.partition('.')[0].lower()}.py"  # a module is found once in a process
    file.write_text(LOOSE)
    factory, folder = located(f"{file}:{name}")
    assert (factory, folder) == (f"{file.stem}:{name}", str(tmp_path))
    made = load_module(JobSpec(run_to_plain(smoke), factory, folder), smoke)
    assert made(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert not any(part.training for part in made.modules())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("name", "message"), [("lazy", "weights without a size"), ("meta", "lies on the meta device")])
def test_a_module_that_computes_nothing_is_refused(name: str, message: str, smoke: DirRun, tmp_path: Path) -> None:
    (tmp_path / "loose_defense.py").write_text(LOOSE)
    with pytest.raises(ConfigError, match=f"^--defense loose_defense:{name} makes a network that .*{message}"):
        load_module(JobSpec(run_to_plain(smoke), f"loose_defense:{name}", str(tmp_path)), smoke)
    sys.modules.pop("loose_defense", None)


def test_other_names_stay_as_they_are() -> None:
    for given in ("none", "runs/dir-1/final", "package.module:make", "models:/dir-digits@champion"):
        assert located(given) == (given, os.getcwd())


def test_an_export_is_judged_as_what_it_was_made_of(smoke: DirRun, tmp_path: Path) -> None:
    defense = find_defense("dir")
    networks = {name: defense.build(smoke, name).state_dict() for name in ("denoiser", "classifier")}
    checkpoint.write(tmp_path / "final", networks, {"stage": "dir", "defense": defense.to_plain(smoke)}, "key")
    hub_folder.write(tmp_path / "final", tmp_path / "hub", "")
    images, logits = torch.rand(2, 1, 8, 8), []
    for name in ("final", "hub"):
        folder = finished(str(tmp_path / name), smoke)
        assert folder == str(tmp_path / name)
        module = load_module(JobSpec(run_to_plain(smoke), folder, ""), smoke)
        assert isinstance(module, Defended)
        logits.append(module.fixed(1)(images))
    assert torch.equal(*logits)


def test_a_stage_means_what_it_ended_in(smoke: DirRun, tmp_path: Path) -> None:
    final = tmp_path / "dir-1" / "final"
    checkpoint.write(final, {}, {}, "key")
    (tmp_path / "weights.pt").touch()
    assert finished(str(final), smoke) == str(final)
    assert finished(str(tmp_path / "dir-1"), smoke) == str(final)
    with pytest.raises(ConfigError, match=r"no committed checkpoint; give one of the stages in it: .*dir-1/final"):
        finished(str(tmp_path), smoke)
    with pytest.raises(ConfigError, match=r"weights.pt is a file: give the folder of a checkpoint, or package.module"):
        finished(str(tmp_path / "weights.pt"), smoke)
    with pytest.raises(ConfigError, match=r"no committed checkpoint; give the folder of .* package.module:factory$"):
        finished(str(tmp_path / "nowhere"), smoke)
