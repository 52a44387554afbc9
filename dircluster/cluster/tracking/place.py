"""Where MLflow's record is, known without MLflow."""

from __future__ import annotations

import os

from dircluster.config import RunConfig, refuse_secret

VARIABLE = "MLFLOW_TRACKING_URI"


def from_environment() -> str:
    """The address that the environment names; empty where it names none, or nothing but blanks."""
    return os.environ.get(VARIABLE, "").strip()


def named(config: RunConfig) -> str:
    """The address that ``tracking.uri`` or the environment names; empty where neither does.

    Raises ConfigError where it holds a password.
    """
    uri = config.tracking.uri or from_environment()
    refuse_secret(VARIABLE, uri)
    return uri
