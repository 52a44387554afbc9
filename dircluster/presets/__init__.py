"""Whole runs by name. A preset's docstring is a promise: the command, what it costs, and what was measured."""

from __future__ import annotations

from collections.abc import Callable

from dircluster.config import ConfigError, RunConfig
from dircluster.presets.base import smoke_of
from dircluster.presets.dir import cifar10, cifar10_joint, cifar100, digits, imagenet_smoke, svhn

PRESETS: dict[str, Callable[[], RunConfig]] = {
    make.__name__: make for make in (digits, cifar10, cifar10_joint, svhn, cifar100)
}
PRESETS |= {f"{name}_smoke": smoke_of(make) for name, make in list(PRESETS.items())}
PRESETS["imagenet_smoke"] = imagenet_smoke


def preset(name: str) -> RunConfig:
    """The run of that name. Raises ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
