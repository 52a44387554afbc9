"""Where MLflow's record is, known without MLflow."""

from __future__ import annotations

import os
import re

from dircluster.config import ConfigError, RunConfig, refuse_secret

VARIABLE = "MLFLOW_TRACKING_URI"


def from_environment() -> str:
    """The address that the environment names; empty where it names none, or nothing but blanks."""
    return os.environ.get(VARIABLE, "").strip()


def named(config: RunConfig) -> str:
    """The address that ``tracking.uri`` or the environment names; empty where neither does.

    Raises ConfigError where it holds a password, or is a database in the memory of one process.
    """
    uri = config.tracking.uri or from_environment()
    refuse_secret(VARIABLE, uri)
    if re.fullmatch(r"sqlite(\+\w+)?:/*(:memory:)?(\?.*)?", uri):
        raise ConfigError(f"tracking.uri {uri!r} names no file: give sqlite:///FOLDER/mlflow.db")
    return uri
