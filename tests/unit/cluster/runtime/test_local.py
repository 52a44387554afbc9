"""A run without Ray whose storage stays away ends by a line."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from dircluster.cluster.runtime import local
from dircluster.config import with_values
from dircluster.presets import preset
from tests.unit.cluster.conftest import Terminal

BUCKET = {"storage.uri": "s3://bucket/runs"}
DATA = {"data.uri": "s3://bucket/data"}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (BUCKET, EndpointConnectionError(endpoint_url="http://127.0.0.1:9")),
        (DATA, EndpointConnectionError(endpoint_url="http://127.0.0.1:9")),
        ({}, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_storage_that_stays_away_ends_a_run_by_a_line(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], error: Exception
) -> None:
    def execute() -> None:
        raise error

    monkeypatch.setattr(local, "Run", lambda *_, **__: SimpleNamespace(execute=execute))
    monkeypatch.setattr(local, "local_workers", lambda *_, **__: nullcontext())
    run = with_values(preset("cifar10_smoke"), settings)
    outcome = local.train(run, "", False, None, Terminal())  # type: ignore[arg-type]
    assert (outcome["status"], outcome["exit"]) == ("FAILED", 1)
    assert type(error).__name__ in outcome["error"]
    assert len(outcome["error"].splitlines()) == 1
