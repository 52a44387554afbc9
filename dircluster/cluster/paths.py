"""Paths and URIs of a config in the form that every worker can read."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from dircluster import zoo
from dircluster.config import ConfigError, RunConfig, local_path


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers live in other folders: what names a file here must name it there."""

    def absolute(uri: str) -> str:
        return uri if ":" in uri else str(Path(uri).expanduser().resolve())

    def replaced(section: Any) -> Any:
        return section if section.uri is None else dataclasses.replace(section, uri=absolute(section.uri))

    uri = config.storage.uri.removeprefix("file://")
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and ":" not in uri and not Path(uri).expanduser().is_absolute():
        raise ConfigError(
            f"storage.uri {uri!r} would lie in a copy of the working directory that ends with the job;"
            " give s3://BUCKET/PREFIX, or the absolute path of a folder that all nodes share"
        )
    kept = dataclasses.replace(config.storage, uri=absolute(uri))
    return dataclasses.replace(config, storage=kept, data=replaced(config.data), target=replaced(config.target))


def must_exist(config: RunConfig) -> None:
    """Raise ConfigError where the run is to read ``data.uri`` or ``target.uri`` on this machine and there is none."""
    zoo.check(config.target.uri)
    if os.environ.get("RAY_ADDRESS") or "RANK" in os.environ:
        return  # workers on other machines may have what is not here
    for name, uri in (("data.uri", config.data.uri), ("target.uri", config.target.uri)):
        if uri is not None and ":" not in uri.removeprefix("file://") and not local_path(uri).exists():
            raise ConfigError(f"{name} {uri!r} does not exist")


def with_reachable_target(config: RunConfig) -> RunConfig:
    """``config`` with a registered target fetched into a folder that workers can read."""
    target = config.target
    if target.uri is None or not target.uri.startswith("models:/"):
        return config
    from dircluster.cluster.tracking.registry import reachable

    return dataclasses.replace(config, target=dataclasses.replace(target, uri=reachable(target.uri, config)))
