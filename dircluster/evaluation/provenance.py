"""What a stored result of an evaluation belongs to: a defense, images, settings, and the code that found it."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dircluster.config import EvaluationConfig, digest
from dircluster.models.modules import to_bytes

PACKAGE = __name__.partition(".")[0]
HERE = Path(__file__).parents[1]
BY_NAME = (f"{PACKAGE}.config", f"{PACKAGE}.presets")
"""Packages of settings, of which every module imports some: only the definitions that are imported by name count."""


def facts_of(
    defense: str | None, data: str, images: int, seed: int, settings: EvaluationConfig, surrogate: str | None = None
) -> dict[str, Any]:
    """What decides the outcome of every unit, but for its case and the code, as plain data.

    ``defense`` and ``surrogate`` are digests: of the committed folder, or of weights and code where there is none.
    """
    shards: dict[str, Any] = {"batch": settings.batch_size, "rows": settings.usual_rows}
    if settings.precision != "auto":  # what is found by auto counts, whatever machine found it: its rows say in what
        shards["precision"] = settings.precision
    if settings.sample is not None:
        shards["sample"] = settings.sample
    return {"defense": defense, "surrogate": surrogate, "data": data, "images": images, "seed": seed, **shards}


def weights_digest(module: nn.Module, code: Iterable[bytes] = ()) -> str:
    """SHA-256 of a module's parts and weights, and of the ``code`` that makes it."""
    found = hashlib.sha256(repr(module).encode())
    for key, value in sorted(module.state_dict().items()):
        found.update(key.encode())
        if isinstance(value, Tensor):
            found.update(str(value.dtype).encode() + to_bytes(value))
    for text in code:
        found.update(text)
    return found.hexdigest()


def attributes_of(module: nn.Module) -> dict[str, str]:
    """What a module and its parts hold beside weights, as far as it is plain: texts by PART.ATTRIBUTE."""
    return {
        f"{name}.{attribute}": repr(value)
        for name, part in module.named_modules()
        for attribute, value in sorted(vars(part).items())
        if not attribute.startswith("_") and attribute != "training" and _is_plain(value)
    }


def module_digest(module: nn.Module) -> str:
    """Digest of a module's weights, and of what its parts hold beside them."""
    return digest([weights_digest(module), attributes_of(module)])


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is made of numbers and texts alone."""
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(part) for key, part in value.items())
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value is None or isinstance(value, bool | int | float | str)


def machine(device: torch.device) -> str:
    """What the bits of a result depend on besides its code, in words: instructions or GPU, PyTorch, threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{platform.machine()} {kind}, torch {torch.__version__}, threads {threads}"


def results_folder(storage: Path, defense: str, facts: Mapping[str, Any]) -> Path:
    """Where the results of an evaluation are kept, whoever begins it: the end of a training, or jobs/evaluate.py.

    ``defense`` is what the table calls it: dir, none, or the name of somebody's module.
    """
    label = re.sub(r"\W+", "-", defense)
    return storage / "evaluations" / f"{label}-{digest(facts)[:12]}"


def modules_of(model: nn.Module) -> frozenset[str]:
    """The modules that define ``model`` and its parts, without installed ones other than this package's.

    Layers of batch statistics do not count: a training on several workers has others, which evaluate alike.
    """
    names = {type(part).__module__ for part in model.modules() if not isinstance(part, _NormBase)}
    return frozenset(name for name in names if name.partition(".")[0] == PACKAGE or _own_file(name))


@cache
def code_digest(modules: frozenset[str], alone: frozenset[str] = frozenset()) -> str:
    """Digest of the source of ``modules``, of all they import within this package, and of those that stand ``alone``.

    Comments, docstrings and layout do not count, and neither does what is imported for type checks only. Of modules
    outside this package, those that are not installed count as they lie in their files, without what they import.
    """
    outside = {name for name in modules if name.partition(".")[0] != PACKAGE}
    found, left, named = set(alone), list(modules - outside), set[str]()
    while left:
        name = left.pop()
        if name in found - alone or name.startswith(BY_NAME):
            continue
        found.add(name)
        alone -= {name}
        for imported, names in _imports(name):
            if imported.startswith(BY_NAME):
                named |= names
            else:
                left.append(imported)
    parts = [_text(name) for name in sorted(found)]
    parts += [text for name, text in _settings() if name in named]
    parts += [file.read_text(encoding="utf-8") for name in sorted(outside) if (file := _own_file(name))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def dumped(node: object) -> str:
    """A syntax tree as text, the same in every version of Python: a newer one adds fields, which are empty here."""
    if isinstance(node, ast.AST):
        fields = (f"{name}={dumped(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(dumped, node))}]" if isinstance(node, list) else repr(node)


def _own_file(name: str) -> Path | None:
    """The file of somebody's own module; None where it is installed, or has no file."""
    file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return None if installed or not file.is_file() else file


@cache
def _settings() -> list[tuple[str, str]]:
    """What the modules of BY_NAME define: names and texts, in an order that does not change where one moves."""
    files = [(package, file) for package in BY_NAME for file in (HERE / package.partition(".")[2]).glob("*.py")]
    nodes = [node for package, file in files for node in _source(f"{package}.{file.stem}").body]
    return sorted((node.name, dumped(node)) for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef))


@cache
def _text(name: str) -> str:
    return dumped(_source(name))


def _file(name: str) -> Path | None:
    """The file of a module of this package; None where there is none of that name."""
    place = HERE.joinpath(*name.split(".")[1:])
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


@cache
def _source(name: str) -> ast.Module:
    """The module's syntax tree, without docstrings and without what stands under ``if TYPE_CHECKING``."""
    file = _file(name)
    if file is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_silent(part)]  # type: ignore[attr-defined]
    return tree


def _is_silent(node: ast.stmt) -> bool:
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return text or (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")


@cache
def _imports(name: str) -> list[tuple[str, set[str]]]:
    """The modules of this package that ``name`` imports, anywhere in its source, and the names taken from each."""
    found: list[tuple[str, set[str]]] = []
    for node in ast.walk(_source(name)):
        if isinstance(node, ast.Import):
            found += [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # a module, or something in one
                found.append((inner, set()) if _is_module(inner) else (node.module, {alias.name}))
    return [(module, names) for module, names in found if _is_module(module)]


def _is_module(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.") and _file(name) is not None
