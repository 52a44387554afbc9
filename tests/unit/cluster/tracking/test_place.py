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
    for file in ("sqlite:///mlflow.db", "sqlite:////tmp/mlflow.db?timeout=5"):
        assert place.named(with_values(preset("digits"), {"tracking.uri": file})) == file
