"""The finished defenses that come with this package, by the names of RobustBench's signature."""

from __future__ import annotations

from pathlib import Path

from dircluster.config import ConfigError

ZOO = {("dir", "cifar10", "Linf"): "cifar10-dir"}
"""Name, data set and threat model of each -> its folder beside this package's rooms."""


def in_zoo(name: str, dataset: str, threat: str) -> Path | None:
    """The folder of that defense; None where there is none."""
    folder = ZOO.get((name, dataset, threat))
    return None if folder is None else Path(__file__).parents[1] / "zoo" / folder


def no_model(name: str, dataset: str, threat: str) -> ConfigError:
    """The error that says what there is instead."""
    there = "; ".join(", ".join(entry) for entry in ZOO)
    return ConfigError(
        f"there is no model {name!r} for {dataset}, {threat}: the zoo has ({there}), and MLflow's registry has no"
        f" champion of that data set and threat named {name}-{dataset} or {name}"
    )
