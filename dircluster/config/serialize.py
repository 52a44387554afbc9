"""Configs as plain data and back, their digests, and what tables show of them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from dircluster.config.errors import ConfigError, first_line, require


def local_path(uri: str) -> Path:
    """The folder or file on this machine that ``uri`` names. Raises ConfigError where it names none."""
    path = as_path(uri)
    require("://" not in path, f"{uri!r} is not on this machine: the core alone reads folders and files")
    with _leading_somewhere(path):
        found = Path(path).expanduser()
        found.exists()  # raises where the system cannot look
        return found


def as_path(uri: str) -> str:
    """``uri`` as a path, where it is the address of one: file:///PATH, or file://localhost/PATH."""
    return re.sub(r"^file://(localhost(?=/))?", "", uri)


def real_path(path: Path) -> Path:
    """``path`` from the root, links followed. Raises ConfigError where one leads back to itself, or nobody may look."""
    with _leading_somewhere(path):
        found = path.resolve()
        found.exists()  # raises where the system cannot look
        return found


@contextlib.contextmanager
def _leading_somewhere(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:  # pathlib's, of links and of homes; of names too long, folders of others
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise ConfigError(f"{str(path)!r} leads nowhere: {reason}") from error


WHOLE = ("warmup_epochs",)
"""Decimal settings that presets once gave as whole numbers: the keys of stages stored since then hold them so."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dictionaries, lists and scalars, each number in one form: 15 and 15.0 are the same setting."""
    plain: dict[str, Any] = {}
    kind: Any = type(config)
    decimals = _decimals(kind)
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        if value is None or isinstance(value, str | bool):
            plain[name] = value
        elif dataclasses.is_dataclass(value):
            plain[name] = to_dict(value)
        elif isinstance(value, int | float) and name in decimals:
            whole = name in WHOLE and value != 0 and float(value).is_integer()
            plain[name] = int(value) if whole else float(value) + 0.0  # which makes 0.0 of -0.0
        else:
            plain[name] = json.loads(json.dumps(value))
    return plain


@cache
def _decimals(kind: type) -> frozenset[str]:
    """Names of the settings of a section that are decimal numbers."""
    hints = get_type_hints(kind)
    return frozenset(name for name, hint in hints.items() if hint is float or float in get_args(hint))


def from_dict(kind: type, plain: dict[str, Any]) -> Any:
    """The inverse of :func:`to_dict`. Raises ConfigError on unknown fields and on values of another type."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(plain) - set(fields))
    require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}")
    default, hints = kind(), get_type_hints(kind)
    made: dict[str, Any] = {}
    for name, value in plain.items():
        was = getattr(default, name)
        if dataclasses.is_dataclass(was) and isinstance(value, dict):
            made[name] = from_dict(type(was), value)
        elif isinstance(value, bool) and "on" in get_args(hints[name]):  # stored when the switch had no auto
            made[name] = "on" if value else "off"
        else:
            require(_fits(value, hints[name]), f"{kind.__name__}.{name} cannot be {value!r}")
            made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data is of the type that a field is declared with: whole numbers are decimal ones too."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is Literal:
        return value in inner
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, inner[0]) for each in value)
    if hint in (int, float):
        huge = hint is float and isinstance(value, int) and abs(value) >= 1 << 1023
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool) and not huge
    return not isinstance(hint, type) or isinstance(value, hint)


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one of dotted names: {"dir": {"alpha": 2}} -> {"dir.alpha": 2}."""
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


AnyConfig = TypeVar("AnyConfig")


def with_values(run: AnyConfig, values: Mapping[str, Any]) -> AnyConfig:
    """``run`` with settings by their dotted names, of the types that a config holds. Raises ConfigError."""
    plain = to_dict(run)
    for name, value in values.items():
        *sections, field = name.split(".")
        inner = plain
        for section in sections:
            require(isinstance(inner.get(section), dict), f"{type(run).__name__} has no setting {name}")
            inner = inner[section]
        inner[field] = value
    made: AnyConfig = from_dict(type(run), plain)
    return made


def short(value: Any) -> str:
    """A setting's value as tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def digest(plain: Any) -> str:
    """SHA-256 of plain data, in hexadecimal."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
