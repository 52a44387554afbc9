"""The files that Ray would send of a working directory, by Ray's own rules."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from dircluster.config import ConfigError, first_line

UNHEARD = logging.getLogger("dircluster.upload")
UNHEARD.setLevel(logging.CRITICAL)


def files_sent(folder: Path) -> list[Path]:
    """What Ray leaves out by itself (``.git``, virtual environments), ``.gitignore`` and ``.rayignore`` leave of it.

    Raises ConfigError where ``folder`` cannot be read.
    """
    found: list[Path] = []
    ignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    whole = folder.absolute()
    never = _get_excludes(whole, ray_constants.get_runtime_env_default_excludes())
    try:
        _dir_travel(whole, [never], found.append, include_gitignore=ignore, logger=UNHEARD)
    except OSError as error:
        raise ConfigError(f"--working-dir {folder} cannot be read: {first_line(error)}") from error
    return sorted(file for file in found if file.is_file())
