"""Images of a run, and a defense or a classifier from any URI as a module."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from dircluster.cluster.storage import check_bucket, is_remote, open_path, opener
from dircluster.config import ANY_ERROR, ConfigError, RunConfig, local_path, named_line, real_path
from dircluster.data.layout import data_cache
from dircluster.data.sources import load
from dircluster.data.split import Dataset
from dircluster.evaluation.provenance import weights_digest
from dircluster.models.modules import defaults_kept, to_eval, unfinished
from dircluster.presets import search_folder
from dircluster.training import hub_folder
from dircluster.training.checkpoint import digest
from dircluster.training.export import load_defense_folder, load_shipped, load_target
from dircluster.zoo import is_shipped

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


FILE_FACTORY = re.compile(r"(.*\.py):([A-Za-z_][\w.]*)")
RELATIVE = re.compile(r"^\s*from\s+\.", re.MULTILINE)


def load_data(config: RunConfig) -> Dataset:
    """The images of a run, wherever they lie. Raises ConfigError where they cannot be read."""
    return load(config.data, config.seed, data_cache(config.storage), opener(config.storage))


def located(defense: str) -> tuple[str, str]:
    """A factory in a file, ``some/mine.py:make``, as package.module:factory and the folder that holds the module.

    A file whose text imports what lies beside it (``from .``) is a module of its package. Any other ``defense`` comes
    back with the current folder. Raises ConfigError where there is no such module, or another of its name.
    """
    found = FILE_FACTORY.fullmatch(defense)
    if found is None:
        return defense, os.getcwd()
    file = real_path(local_path(found[1]))
    if not file.is_file():
        raise ConfigError(f"--defense {defense}: {file} does not exist")
    if not file.stem.isidentifier():
        raise ConfigError(f"--defense {defense}: {file.stem!r} cannot be imported; rename the file")
    name, folder = file.stem, file.parent
    if RELATIVE.search(file.read_text(encoding="utf-8", errors="replace")):
        name, folder = f"{folder.name}.{name}", folder.parent
        while (folder / "__init__.py").is_file():
            name, folder = f"{folder.name}.{name}", folder.parent
    other = _file_of(name.partition(".")[0])
    if other is not None and other not in (str(file), str(folder / name.partition(".")[0] / "__init__.py")):
        raise ConfigError(
            f"--defense {defense}: {name.partition('.')[0]!r} is the name of another module ({other}); rename yours"
        )
    return f"{name}:{found[2]}", str(folder)


def _file_of(module: str) -> str | None:
    """The file of the module that an import of that name finds; ``built-in`` or ``frozen`` where it has none."""
    try:
        found = importlib.util.find_spec(module)
    except ValueError:  # of a module without a specification, such as __main__
        return module
    if found is None or found.origin is None:  # a folder without __init__.py
        return None
    return str(Path(found.origin).resolve()) if found.has_location else found.origin


def finished(uri: str, config: RunConfig) -> str:
    """The folder of the finished defense that ``uri`` means: itself, or ``final`` in a stage's folder.

    It is a committed checkpoint or an export. What has no folder (none, zoo:NAME, package.module:factory) is itself.
    Raises ConfigError, with the way out, where it is a file or holds neither.
    """
    if uri == "none" or is_shipped(uri) or FACTORY.fullmatch(uri):
        return uri
    folder = open_path(uri, config.storage)
    if digest(folder) is not None or hub_folder.is_one(folder):
        return uri
    if digest(folder / "final") is not None:
        return f"{uri.rstrip('/')}/final"
    if folder.is_file():
        raise ConfigError(
            f"--defense {uri} is a file: give the folder of a checkpoint, or package.module:factory (some/mine.py:make)"
            " that makes the network and loads its weights; a bare classifier is --defense none --target.uri FILE"
        )
    below = sorted(str(found.parent) for found in folder.glob("*/final/COMMIT")) if isinstance(folder, Path) else []
    hint = f"give one of the stages in it: {', '.join(below[:3])}{', ...' * (len(below) > 3)}"
    if not below:
        hint = "give the folder of a stage or of an export, models:/NAME@ALIAS, zoo:NAME or package.module:factory"
    raise ConfigError(f"--defense {uri} holds no committed checkpoint; {hint}")


@dataclass(frozen=True)
class JobSpec:
    """What is to be judged on what, as plain data that can be sent to a worker."""

    config: dict[str, Any]
    """A run, see presets.run_to_plain."""
    defense: str
    """none, zoo:NAME, package.module:factory, or the folder of a checkpoint, here or in object storage."""
    path: str
    """Folder that package.module is looked for in, before the installed ones."""
    surrogate: str = ""
    """A classifier's URI to craft transfers on, empty for the defense's own target."""
    trust_code: bool = False
    keep_images: bool = False
    key: str = ""
    """What the first process found: workers that find something else do not begin."""


def load_module(job_spec: JobSpec, config: RunConfig) -> nn.Module:
    """The module that ``job_spec`` names, in eval mode on the CPU."""
    data, storage = config.data, config.storage
    if job_spec.defense == "none":
        if config.target.uri is None:
            raise ConfigError("--defense none judges the bare target: say which with --target.uri")
        return load_classifier(config.target.uri, config)
    if is_shipped(job_spec.defense):
        defense = load_shipped(job_spec.defense)
    elif FACTORY.fullmatch(job_spec.defense):
        return _made(job_spec)
    else:
        if job_spec.trust_code:
            search_folder(job_spec.path)
        if is_remote(job_spec.defense):
            check_bucket(job_spec.defense, storage)
        try:
            defense = load_defense_folder(open_path(job_spec.defense, storage), trust_code=job_spec.trust_code)
        except OSError as error:
            raise ConfigError(f"--defense {job_spec.defense} cannot be read: {error.strerror or error}") from error
    found, wanted = defense.image_shape, (data.channels, data.height, data.width)
    if found is not None and found != wanted:
        raise ConfigError(
            f"--defense takes {'x'.join(map(str, found))} images, but preset {config.name} has"
            f" {data.channels}x{data.height}x{data.width}; name the preset it was trained with"
        )
    return defense


def load_classifier(uri: str, config: RunConfig) -> nn.Module:
    """The classifier that ``uri`` names as ``target.uri`` would, in eval mode on the CPU.

    ``target.mean``, ``target.std`` and ``target.entry`` are of ``target.uri`` alone: another file says its own.
    """
    own = {} if uri == config.target.uri else {"mean": None, "std": None, "entry": None}
    target = dataclasses.replace(config.target, uri=uri, **own)  # type: ignore[arg-type]
    classifier = load_target(dataclasses.replace(config, target=target), opener(config.storage))
    to_eval(classifier)
    return classifier


def _made(job_spec: JobSpec) -> nn.Module:
    """What a factory makes, in eval mode, whatever it does to PyTorch's defaults."""
    name, _, attribute = job_spec.defense.partition(":")
    search_folder(job_spec.path)
    with defaults_kept():
        try:
            make = attrgetter(attribute)(importlib.import_module(name))
            made = make if isinstance(make, nn.Module) else make()
        except ANY_ERROR as error:
            raise ConfigError(f"--defense {job_spec.defense}: {named_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"--defense {job_spec.defense} must return a torch.nn.Module, got {type(made).__name__}")
    if wrong := unfinished(made):
        raise ConfigError(f"--defense {job_spec.defense} makes a network that {wrong}")
    to_eval(made)
    return made


def fingerprint(module: nn.Module, name: str) -> str:
    """SHA-256 of a module's weights and, where it is somebody's own, of the package that makes it, unless installed."""
    return weights_digest(module, _code_of(name) if FACTORY.fullmatch(name) else ())


def _code_of(factory: str) -> Iterator[bytes]:
    package = factory.partition(":")[0].partition(".")[0]
    for key, part in sorted(sys.modules.items()):
        file = Path(getattr(part, "__file__", None) or "")
        if key.partition(".")[0] == package and file.is_file() and "site-packages" not in file.parts:
            yield file.read_bytes()
