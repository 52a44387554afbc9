"""Where the record is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dircluster.cluster.tracking import place
from dircluster.cluster.tracking.jobs import default_uri
from dircluster.config import ConfigError, with_values
from dircluster.presets import preset


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_address_in_the_environment_is_none(
    blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(place.VARIABLE, blank)
    run = with_values(preset("digits"), {"storage.uri": str(tmp_path)})
    assert place.named(run) == ""
    assert default_uri(run) == f"sqlite:///{tmp_path}/mlflow.db"  # and not a file in the current folder
    with pytest.raises(ConfigError, match=r"tracking.uri must not be empty"):
        with_values(run, {"tracking.uri": blank})


def test_a_password_in_the_environment_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.VARIABLE, "http://joe:hunter2@mlflow:5000")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI must not hold a user or password") as refused:
        place.named(preset("digits"))
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite+pysqlite:///?mode=ro"])
def test_a_database_that_ends_with_its_process_is_no_record(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"names no file: give sqlite:///FOLDER/mlflow.db"):
        place.named(with_values(preset("digits"), {"tracking.uri": uri}))


@pytest.mark.parametrize(
    ("uri", "whole"),
    [
        ("sqlite:///runs/mlflow.db", "sqlite:///{here}/runs/mlflow.db"),
        ("sqlite:///mlflow.db?timeout=5", "sqlite:///{here}/mlflow.db?timeout=5"),
        ("sqlite:////tmp/mlflow.db?timeout=5", "sqlite:////tmp/mlflow.db?timeout=5"),
        ("mlruns", "{here}/mlruns"),
        ("file:mlruns", "file:{here}/mlruns"),
        ("file:///tmp/mlruns", "file:///tmp/mlruns"),
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("databricks", "databricks"),
    ],
)
def test_a_record_below_the_current_folder_is_named_by_its_whole_path(
    uri: str, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives workers and trials other current folders."""
    monkeypatch.chdir(tmp_path)
    assert place.named(with_values(preset("digits"), {"tracking.uri": uri})) == whole.format(here=tmp_path)
    monkeypatch.setenv(place.VARIABLE, uri)
    assert place.named(preset("digits")) == whole.format(here=tmp_path)


def test_a_record_that_would_end_with_the_copy_of_a_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv(place.VARIABLE, "sqlite:///runs/mlflow.db")
    with pytest.raises(ConfigError, match="would lie in a copy of the working directory"):
        place.named(preset("digits"))
    monkeypatch.setenv(place.VARIABLE, "http://mlflow:5000")
    assert place.named(preset("digits")) == "http://mlflow:5000"
