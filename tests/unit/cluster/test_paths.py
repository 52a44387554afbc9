"""Paths of a config as every worker can read them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from dircluster import cli
from dircluster.cluster.commands.train import Launch
from dircluster.cluster.paths import absolute, with_absolute_paths
from dircluster.config import with_values
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


def test_one_folder_is_one_run_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    forms = [f"file://{tmp_path}/there", "there", "./there/", f"{tmp_path}/there"]
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
    launch.foretold = []
    launch._tell({"status": "FINISHED", "results": [], "checkpoint": folder}, Terminal())
    line = next(line for line in said if line.startswith("judge it"))
    assert shlex.split(line)[-2:] == ["--defense", folder]
