"""Which defense and preset a command line means, a module of the user's own included; errors of one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dircluster import cli
from dircluster.cluster.commands import benchmark, doctor, evaluate, train, tune
from dircluster.config import ConfigError
from dircluster.presets import preset, run_from_plain, run_to_plain

MODULE = """
from dataclasses import dataclass
from typing import ClassVar
from dircluster.config import RunConfig
from dircluster.defenses.stage import Defense

@dataclass(frozen=True)
class Section:
    depth: int = 3
    place: str = ""

@dataclass(frozen=True)
class MineRun(RunConfig):
    defense: ClassVar[str] = "{name}"
    mine: Section = Section()

DEFENSE = Defense(name="{name}", run=MineRun, modules=lambda run: {{}}, stages=lambda run: (), describe=lambda run: "")
"""
PRESETS = """
PRESETS = {"first": MineRun, "deep": lambda: MineRun(name="deep", mine=Section(depth=9)), "digits": lambda: 3}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules of all kinds in a package."""
    folder = tmp_path / "ours"
    folder.mkdir()
    texts = {
        "bare": MODULE.format(name="ours.bare"),
        "mine": MODULE.format(name="ours.mine") + PRESETS,
        "renamed": MODULE.format(name="ours.mine"),
        "none": "",
        "wrong": "DEFENSE = 3",
        "broken": "1 / 0",
        "ends": "import sys; sys.exit(3)",
        "needs": "import not_there_at_all",
        "listed": MODULE.format(name="ours.listed") + "PRESETS = ['a']",
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "ours"]:
        del sys.modules[name]


def parse(*words: str) -> cli.TrainJob:
    return cli.parse(cli.TrainJob, words)


def test_a_defense_of_this_package(place: Path) -> None:
    assert parse("--defense", "dir").run == parse("digits", "--defense=dir").run == parse().run
    assert parse("cifar10").defense == "dir"


def test_presets_of_ones_own(place: Path) -> None:
    job = parse("deep", "--defense", "ours.mine", "--mine.place", "1/2")
    assert (job.preset, job.defense, job.run.mine.depth, job.run.mine.place) == ("deep", "ours.mine", 9, "1/2")
    assert parse("ours.mine:deep").run == preset("deep", "ours.mine") == preset("ours.mine:deep")
    assert parse("--defense=ours.mine").preset == "first"
    assert cli.command(job) == "python jobs/train.py deep --defense ours.mine --mine.place 1/2"
    assert cli.command(job, "evaluate") == "python jobs/evaluate.py ours.mine:deep --trust-code --mine.place 1/2"
    assert cli.parse(cli.EvaluateJob, ["ours.mine:deep", "--defense", "x"]).run == preset("ours.mine:deep")
    again = cli.command(job).split()[2:]
    assert parse(*again).run == job.run


def test_settings_as_they_are(place: Path) -> None:
    job = parse("--defense", "ours.bare", "--mine.depth", "4")
    assert (job.preset, job.run.mine.depth) == ("", 4)
    assert cli.command(job) == "python jobs/train.py --defense ours.bare --mine.depth 4"
    assert cli.parse(cli.EvaluateJob, ["ours.bare:", "--mine.depth", "4"]).run == job.run


def test_printed_settings_are_read_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["deep", "--defense", "ours.mine"]
    assert train.main([*words, "--seed", "3", "--print-config"]) == 0
    (place / "all.yaml").write_text(capsys.readouterr().out)
    assert parse(*words, "--config", "all.yaml").run == parse(*words, "--seed", "3").run


def test_another_process_finds_the_module_where_it_lies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = parse("deep", "--defense", "ours.mine").run
    plain = run_to_plain(run)
    assert plain["folder"] == str(place.resolve())
    for name in ("ours", "ours.mine"):
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part != plain["folder"]])
    assert run_to_plain(run_from_plain(plain)) == plain
    assert "folder" not in run_to_plain(preset("digits"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defense", "ours.absent"], "there is no defense 'ours.absent': it is none of dir, apegan, apegan_a, hgd,"),
        (["--defense", "hgdd"], "there is no defense 'hgdd'"),
        (["--defense", "ours.none"], "ours.none has no DEFENSE"),
        (["--defense", "ours.wrong"], "ours.wrong.DEFENSE must be a dircluster.defenses.stage.Defense"),
        (["--defense", "ours.broken"], "defense ours.broken cannot be imported: ZeroDivisionError: division by zero"),
        (["--defense", "ours.ends"], "defense ours.ends cannot be imported: SystemExit: 3"),
        (["--defense", "ours.needs"], "cannot be imported: ModuleNotFoundError: No module named 'not_there_at_all'"),
        (["--defense", "ours.renamed"], "MineRun.defense must be 'ours.renamed'"),
        (["--defense", "ours.listed"], "ours.listed.PRESETS must map names"),
        (["cifar10", "--defense", "ours.mine"], "no preset 'cifar10', which is of defense dir; there are first, deep"),
        (["digits", "--defense", "ours.bare"], "which is of defense dir; it has no PRESETS: leave the name out"),
        (["digits", "--defense", "ours.mine"], "preset 'digits' must be a MineRun, got int"),
        (["ours.mine:deep", "--defense", "dir"], "preset ours.mine:deep is of another defense than --defense dir"),
        (["nope"], "unknown preset 'nope'"),
        (["deep", "--defense", "ours.mine", "--mine.depth", "x"], "--mine.depth"),
        (["digits", "--config", "d.yaml"], "--defense ours.mine stands in the --config file"),
    ],
)
def test_errors_are_one_line(place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "d.yaml").write_text("defense: ours.mine\n")
    for main in (train.main, tune.main, benchmark.main, doctor.main):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_an_evaluation_means_its_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["ours.none:x", "--defense", "none"]) == 2
    assert "ours.none has no DEFENSE" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown preset 'deep'"):
        cli.parse(cli.EvaluateJob, ["deep", "--defense", "ours.mine"])
