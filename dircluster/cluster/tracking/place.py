"""Where MLflow's record is, known without MLflow."""

from __future__ import annotations

import os
import re

from dircluster.config import ConfigError, RunConfig, refuse_secret

VARIABLE = "MLFLOW_TRACKING_URI"
HERE = re.compile(
    r"(?P<kind>sqlite(\+\w+)?:///|file:(?!/)|(?![\w+.-]+:|databricks|/))(?P<path>[^/?][^?]*)(?P<query>\?.*)?"
)
"""An address that names a file or a folder below the current one."""


def from_environment() -> str:
    """The address that the environment names; empty where it names none, or nothing but blanks."""
    return os.environ.get(VARIABLE, "").strip()


def named(config: RunConfig) -> str:
    """The address that ``tracking.uri`` or the environment names; empty where neither does.

    A file below the current folder by its whole path: workers have other current folders. Raises ConfigError where it
    holds a password, is a database in the memory of one process, or would end with a job's copy of the folder.
    """
    uri = config.tracking.uri or from_environment()
    refuse_secret(VARIABLE, uri)
    if re.fullmatch(r"sqlite(\+\w+)?:/*(:memory:)?(\?.*)?", uri):
        raise ConfigError(f"tracking.uri {uri!r} names no file: give sqlite:///FOLDER/mlflow.db")
    here = HERE.fullmatch(uri)
    if here is None:
        return uri
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"tracking.uri {uri!r} would lie in a copy of the working directory that ends with the job;"
            " give the address of an MLflow server, or an absolute path"
        )
    return f"{here['kind']}{os.path.abspath(here['path'])}{here['query'] or ''}"
