"""Paths of a config as every worker can read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dircluster import cli
from dircluster.cluster.commands import evaluate, train
from dircluster.cluster.commands.train import Launch
from dircluster.cluster.paths import absolute, with_absolute_paths
from dircluster.config import ConfigError, with_values
from dircluster.presets import preset


@pytest.mark.parametrize("uri", ["s3://bucket/runs", "models:/dir-digits@champion", "zoo:digits-at", "timm:test_vit"])
def test_what_is_no_file_of_this_machine_stays_as_it_is(uri: str) -> None:
    assert absolute(uri) == uri


@pytest.mark.parametrize("uri", ["runs", "c:d", "it's a:b", "a/12:30", "./x", "file://runs"])
def test_a_folder_may_hold_a_colon(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = with_absolute_paths(with_values(preset("digits"), {"storage.uri": uri, "data.uri": uri, "target.uri": uri}))
    wanted = str(tmp_path / uri.removeprefix("file://"))
    assert (run.storage.uri, run.data.uri, run.target.uri) == (wanted, wanted, wanted)


@pytest.mark.parametrize("name", ["storage.uri", "data.uri", "target.uri"])
@pytest.mark.parametrize("uri", ["loop", "loop/x", "file://loop", "~nobody-of-this-name/x"])
def test_what_leads_nowhere_is_told_in_a_line(
    name: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"^'.*(loop|x)' leads nowhere: (Symlink loop|Could not .* home).*$"):
        with_absolute_paths(with_values(preset("digits"), {name: uri}))


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, "digits_smoke --summary loop"),
        (train.main, "digits_smoke --export loop/x"),
        (evaluate.main, "digits --defense none --export loop/x.pt"),
        (evaluate.main, "digits --defense loop"),
        (evaluate.main, "digits --defense loop/x.py:make"),
    ],
)
def test_so_is_what_a_command_is_given(
    main: Callable[[list[str]], int],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert main([*words.split(), "--launcher", "local"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: .*(leads nowhere|does not exist).*", line)


def test_one_folder_is_one_run_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    forms = [f"file://{tmp_path}/there", f"file://localhost{tmp_path}/there", "there", "./there/", f"{tmp_path}/there"]
    runs = {
        with_absolute_paths(with_values(preset("digits"), {"storage.uri": form, "data.uri": form})) for form in forms
    }
    assert len(runs) == 1


def test_the_command_that_judges_a_run_can_be_typed_as_it_is_printed(tmp_path: Path) -> None:
    folder = str(tmp_path / "it's a:b" / "dir-0123" / "final")
    said: list[str] = []

    class Terminal:
        say = staticmethod(said.append)

        def table(self, rows: Any) -> None: ...

    launch = Launch(cli.parse(cli.TrainJob, ["digits", "--storage.uri", str(tmp_path / "it's a:b")]))
    launch.foretold = None
    launch._tell({"status": "FINISHED", "results": [], "checkpoint": folder}, Terminal())
    line = next(line for line in said if line.startswith("judge it"))
    assert shlex.split(line)[-2:] == ["--defense", folder]
