"""Paths and URIs of a config in the form that every worker can read."""

from __future__ import annotations

import dataclasses
import os
import re
from types import ModuleType
from typing import Any

from dircluster.cluster.storage import endpoint, is_remote
from dircluster.config import ConfigError, RunConfig, as_path, local_path, real_path

ELSEWHERE = re.compile(r"[A-Za-z][\w+.-]+:/|zoo:|timm:")
"""How what is no file of this machine begins: s3://, models:/, and networks by name. A folder may hold a colon."""


def absolute(uri: str) -> str:
    """``uri`` as any folder of this machine would understand it. Raises ConfigError where it leads nowhere."""
    path = as_path(uri)
    return path if ELSEWHERE.match(path) else str(real_path(local_path(path)))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Workers live in other folders: what names a file here must name it there."""

    def replaced(section: Any) -> Any:
        return section if section.uri is None else dataclasses.replace(section, uri=absolute(section.uri))

    uri = as_path(config.storage.uri)
    here = ELSEWHERE.match(uri) is None and not local_path(uri).is_absolute()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and here:
        raise ConfigError(
            f"storage.uri {uri!r} would lie in a copy of the working directory that ends with the job;"
            " give s3://BUCKET/PREFIX, or the absolute path of a folder that all nodes share"
        )
    kept = dataclasses.replace(config.storage, uri=absolute(uri))
    if any(is_remote(uri or "") for uri in (kept.uri, config.data.uri, config.target.uri)):
        region = kept.region or os.environ.get("AWS_DEFAULT_REGION")  # as this process sees them: workers may not
        kept = dataclasses.replace(kept, endpoint=endpoint(kept), region=region)
    return dataclasses.replace(config, storage=kept, data=replaced(config.data), target=replaced(config.target))


def with_reachable_target(config: RunConfig) -> RunConfig:
    """``config`` with a registered target fetched into a folder that workers can read."""
    uri = None if config.target.uri is None else reachable(config.target.uri, config)
    return dataclasses.replace(config, target=dataclasses.replace(config.target, uri=uri))


def reachable(uri: str, config: RunConfig) -> str:
    """``uri``; where it names a registered model, the folder in ``config.storage`` that it is fetched into for all.

    Raises ConfigError where it is not to be had.
    """
    return str(_registry(uri).reachable(uri, config)) if uri.startswith("models:/") else uri


def fetched(uri: str, config: RunConfig) -> str:
    """``uri``; where it names a registered model, a folder of this process, out of storage.

    Raises ConfigError where it is not to be had.
    """
    if not uri.startswith("models:/"):
        return uri
    registry = _registry(uri)
    from dircluster.cluster.tracking.jobs import default_uri

    return str(registry.fetch(uri, default_uri(config)))


def _registry(uri: str) -> ModuleType:
    try:
        from dircluster.cluster.tracking import registry
    except ModuleNotFoundError as error:
        raise ConfigError(f"{uri} cannot be fetched: {error.name} is not installed") from error
    return registry
