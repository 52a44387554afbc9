"""What a setting that cannot work raises, and what keeps secrets out of configs and messages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot work. Its text is one line: the field, the value and the way out.

    What would break the line, or cannot be shown, as a path may hold, is escaped.
    """

    exit_code = 2
    """Of a command that ends on it."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in message))


class StoppedError(ConfigError):
    """Work that was under way and has lost what it needs, a cluster or storage: the same command goes on."""

    exit_code = 1

    @classmethod
    def of(cls, what: str, reason: str) -> StoppedError:
        return cls(f"the {what} stopped ({reason}); the same command goes on")


ANY_ERROR = (Exception, SystemExit)
"""What somebody else's code may raise; one that parses arguments where it is imported ends by SystemExit."""


def error_to_plain(error: ConfigError) -> dict[str, Any]:
    """A ConfigError as plain data: its message, and the names of its class and of those that it derives from."""
    kinds = [kind for kind in type(error).__mro__ if issubclass(kind, ConfigError)]
    return {"message": str(error), "kinds": [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]}


def error_from_plain(plain: Mapping[str, Any]) -> ConfigError:
    """The inverse of :func:`error_to_plain`, of the nearest class that is known here; no name is imported."""
    known, left = {}, [ConfigError]
    while left:
        kind = left.pop()
        left += kind.__subclasses__()
        if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
            known[f"{kind.__module__}.{kind.__qualname__}"] = kind
    return next((known[name] for name in plain["kinds"] if name in known), ConfigError)(plain["message"])


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line: its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def named_line(error: BaseException) -> str:
    """The same behind its name; the name alone where it says nothing."""
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


_USER = re.compile(r"(?<=://)(?:[^/\s@]*|[^\s@]*:[^\s@]*)@")  # AWS's keys may hold slashes
_SECRET = r"(?:password|passwd|pwd|secret)[\w-]*|(?:token|signature|credential|api_?key)s?"  # no tokenizer=
_FIELD = re.compile(rf"(?<=[?&;])((?:[\w-]*(?:{_SECRET})|sig)=)[^&;\s]+", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """``text`` with users and passwords of its URIs taken out."""
    return _FIELD.sub(r"\1...", _USER.sub("...@", text))


def refuse_secret(name: str, value: str) -> None:
    """Raise ConfigError where a URI holds a user or password: configs are logged."""
    require(
        without_secrets(value) == value,
        f"{name} must not hold a user or password ({without_secrets(value)});"
        " give credentials in the environment, a mounted file or the instance role",
    )


def require_share(name: str, value: float | None) -> None:
    """Raise ConfigError unless ``value`` is missing or lies in [0, 1)."""
    require(value is None or 0 <= value < 1, f"{name} must lie in [0, 1), got {value}")


def require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name} must be positive, got {value}")


LONGEST = 1e9
"""Seconds, thirty years: clocks of threads and process groups overflow at ten times as many."""


def require_seconds(section: str, config: Any, *names: str) -> None:
    """Raise ConfigError where something may take longer than any clock counts."""
    for name in names:
        value = getattr(config, name)
        require(not value > LONGEST, f"{section}.{name} must be at most {LONGEST:g} seconds, got {value:g}")
