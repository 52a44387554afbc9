"""A finished defense as a folder that model hubs show: model.safetensors, config.json, and the card as README.md."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as dump_tensors
from torch import Tensor

from dircluster.config import ConfigError, digest, real_path
from dircluster.defenses.table import UNNAMED
from dircluster.files import FETCH, POINTER, check_writable
from dircluster.models import weight_files
from dircluster.training import checkpoint

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LIBRARY = "dircluster"
FRONT = """---
library_name: dircluster
pipeline_tag: image-classification
tags: [adversarial-robustness, adversarial-purification, {defense}]
---
"""


def is_one(folder: Path) -> bool:
    """Whether ``folder`` looks like one, and not like a checkpoint."""
    return (folder / CONFIG).is_file() and not (folder / checkpoint.COMMIT).exists()


def _is_ours(folder: Path) -> bool:
    """Whether ``folder`` holds an earlier export, and not somebody else's model, which has the same files."""
    try:
        return is_one(folder) and json.loads((folder / CONFIG).read_bytes())["library_name"] == LIBRARY
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def check(folder: Path) -> None:
    """Raise ConfigError unless ``folder`` can be written: it is new, empty, or an earlier export."""
    if not real_path(folder).parent.is_dir():
        raise ConfigError(f"--export {folder}: the folder that it would lie in does not exist")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--export {folder} is a file: name a folder")
    try:
        if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
            raise ConfigError(f"--export {folder} holds other files: name a new folder")
        check_writable(folder if folder.is_dir() else real_path(folder).parent)
    except OSError as error:
        raise ConfigError(f"--export {folder} cannot be written: {error.strerror}") from error


def write(checkpoint_folder: Path, folder: Path, card: str) -> None:
    """Write the finished defense of ``checkpoint_folder``, with its card. Raises ConfigError where that cannot be."""
    found = checkpoint.read(checkpoint_folder)
    facts = found.state.get("defense")
    if not isinstance(facts, dict):
        raise ConfigError(f"{checkpoint_folder} holds no finished defense")
    tensors = {f"{part}.{name}": value for part, group in found.tensors.items() for name, value in group.items()}
    blob = dump_tensors(tensors, {"format": "pt"})
    sums = {"sha256": hashlib.sha256(blob).hexdigest(), "defense_sha256": digest(facts)}
    config = {"library_name": LIBRARY, "defense": facts, **sums}
    try:
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)  # it is written last: without it there is no export
        (folder / WEIGHTS).write_bytes(blob)
        front = FRONT.format(defense=facts.get("name", UNNAMED))
        (folder / CARD).write_bytes((front + card).encode(errors="backslashreplace"))  # a path may hold any bytes
        (folder / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        with contextlib.suppress(OSError):  # what is left of it would look like somebody's own files
            for name in (CONFIG, WEIGHTS, CARD):
                (folder / name).unlink(missing_ok=True)
        raise ConfigError(f"--export {folder} cannot be written: {error.strerror}") from error


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What the defense is, and its weights by network. Raises CheckpointError where the folder is not whole."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        blob = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError as error:
        raise checkpoint.CheckpointError(f"{folder} has a {CONFIG}, but no {WEIGHTS}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise checkpoint.CheckpointError(f"{folder}: its {CONFIG} cannot be read") from error
    if not isinstance(config, Mapping) or not isinstance(config.get("defense"), dict):
        raise checkpoint.CheckpointError(f"{folder} holds no defense of {LIBRARY}: its {CONFIG} is of something else")
    if config.get("defense_sha256") not in (None, digest(config["defense"])):  # older exports have none
        raise checkpoint.CheckpointError(
            f"{folder}: what {CONFIG} says of the defense is not what was written with its weights, such as its masks;"
            " export it again"
        )
    if blob.startswith(POINTER):
        raise checkpoint.CheckpointError(f"{folder / WEIGHTS} {FETCH}")
    if hashlib.sha256(blob).hexdigest() != config.get("sha256"):
        raise checkpoint.CheckpointError(f"{folder} is damaged: {WEIGHTS} is not what was written")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, value in weight_files.parse(blob, str(folder / WEIGHTS)).items():
        part, _, rest = name.partition(".")
        tensors.setdefault(part, {})[rest] = value
    return dict(config["defense"]), tensors
