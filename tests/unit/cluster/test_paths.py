"""Paths of a config as every worker can read them."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dircluster import cli
from dircluster.cluster import preflight, tracking
from dircluster.cluster.commands import evaluate, leaderboard, replay, train, tune
from dircluster.cluster.commands.train import Launch
from dircluster.cluster.loading import JobSpec, load_module
from dircluster.cluster.paths import absolute, fetched, reachable, with_absolute_paths, with_reachable_target
from dircluster.config import ConfigError, RunConfig, with_values
from dircluster.presets import preset
from dircluster.training import hub_folder
from tests.jobs import ROOT

CLAIM = ROOT / "docs" / "claims" / "digits-at.json"


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


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, "digits_smoke --launcher local --target.uri LONG"),
        (train.main, "digits_smoke --launcher local --export LONG"),
        (evaluate.main, "digits --launcher local --defense LONG"),
        (evaluate.main, "digits --launcher local --defense LONG:make"),
        (tune.main, "digits_smoke --space LONG"),
        (replay.main, f"{CLAIM} 1 --defense LONG"),
        (leaderboard.main, f"{CLAIM.parent} LONG"),
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(
    main: Callable[[list[str]], int],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.replace("LONG", 300 * "a").split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leads nowhere: File name too long" in line or "there is no module" in line


@pytest.mark.parametrize(
    "work",
    [
        lambda folder, run: preflight.check_model("target.uri", str(folder), run, away=False),
        lambda folder, run: hub_folder.check(folder),
        lambda folder, run: load_module(JobSpec({}, str(folder), ""), run),
    ],
)
def test_a_folder_that_another_user_keeps_closed_is_one_line(
    work: Callable[[Path, RunConfig], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "iterdir", closed)
    monkeypatch.setattr(hub_folder, "is_one", closed)
    with pytest.raises(ConfigError, match=r"^(target.uri|--export|--defense) .* cannot be \w+: Permission denied$"):
        work(tmp_path, preset("digits"))


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


@pytest.mark.parametrize("ask", [reachable, fetched, lambda uri, run: with_reachable_target(run)])
def test_a_registered_model_without_mlflow_is_one_line(
    ask: Callable[[str, RunConfig], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "dircluster.cluster.tracking.registry", raising=False)
    monkeypatch.delattr(tracking, "registry", raising=False)
    run = with_values(preset("digits_smoke"), {"target.uri": "models:/dir-digits@champion"})
    with pytest.raises(ConfigError, match=r"^models:/dir-digits@champion cannot be fetched: mlflow is not installed$"):
        ask("models:/dir-digits@champion", run)
    assert ask("runs", preset("digits_smoke")) in ("runs", preset("digits_smoke"))
