"""Paths and URIs of a config in the form that every worker can read."""

from __future__ import annotations

import dataclasses
import os
import re
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
    target = config.target
    if target.uri is None or not target.uri.startswith("models:/"):
        return config
    from dircluster.cluster.tracking.registry import reachable

    return dataclasses.replace(config, target=dataclasses.replace(target, uri=reachable(target.uri, config)))
