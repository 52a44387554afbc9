"""What a registered model needs to run where this package is not installed: its code, and whose else's it imports."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from pathlib import Path

import dircluster
from dircluster.config import RunConfig
from dircluster.defenses.stage import architecture
from dircluster.defenses.table import DEFENSES

BASE = ("torch", "numpy", "safetensors")
"""What every defense imports when it is loaded."""
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "*.safetensors", ".*")


def pack(config: RunConfig, folder: Path) -> tuple[list[str], list[str]]:
    """Copy the code of the defense into ``folder``: -> code paths and pinned requirements, as MLflow takes them.

    A defense or a target of somebody's own travels with its top-level package, or its file.
    """
    code, named = [_copied(Path(dircluster.__file__).parent, folder)], list(BASE)
    own = [] if config.defense in DEFENSES else [config.defense.partition(".")[0]]
    made_by = architecture(config)
    if ":" in made_by:
        own.append(made_by.partition(":")[0].partition(".")[0])
    for top in dict.fromkeys(own):
        place = _place(top)
        if place is not None and {"site-packages", "dist-packages"} & set(place.parts):
            named += importlib.metadata.packages_distributions().get(top, [])
        elif place is not None:
            code.append(_copied(place, folder))
    return code, [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in dict.fromkeys(named)]


def _place(top: str) -> Path | None:
    """The folder or file of a top-level module, also of one that lies in the current folder."""
    spec = importlib.util.find_spec(top)
    if spec is not None:
        found = [*(spec.submodule_search_locations or []), spec.origin or ""]
        return Path(found[0])
    return next((each for each in (Path(top).resolve(), Path(f"{top}.py").resolve()) if each.exists()), None)


def _copied(source: Path, folder: Path) -> str:
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target, ignore=LEFT_OUT)
    else:
        shutil.copyfile(source, target)
    return str(target)
