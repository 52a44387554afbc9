"""The finished defenses that come with this package: ``zoo:NAME``, wherever a defense or a target is named.

A folder beside this file holds a defense and its target, in the bf16 in which they were judged, a card (README.md), and
the claim of each: what it was found to keep, with the evidence. ``infra/write_zoo.py`` makes such a folder. That called
``cifar10-pretrain`` is none: it holds the denoiser of ``zoo:cifar10-dir`` as pre-training left it, and has no name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dircluster.config import ConfigError

PREFIX = "zoo:"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Shipped:
    """A finished defense, or the target of one."""

    folder: str
    """Beside this file."""
    sha256: str
    """Of the folder's manifest, which lists those of the weights."""
    threat: str = "Linf"
    """As RobustBench names it."""
    bare: bool = False
    """Whether it is the target alone."""


_DIGITS = "f1d3e369b6d2708f7ad3c4e33fdc0330396dc0decfe563502704c0baacec7225"
_CIFAR10 = "355b099982df124d8a5cc0706f2ec0c4b87c05db7085772a82be5df7fb8f3b3b"
_SMALL = "78c01f21f869987381d59ad7d073a82186849f1b979753973f7b718e0d3afb56"
ZOO = {
    "digits-dir": Shipped("digits-dir", _DIGITS),
    "digits-at": Shipped("digits-dir", _DIGITS, bare=True),
    "digits-hgd": Shipped("digits-hgd", "e49610b52011e40e10331601b78b323c651e4b3106f80d9b7968c5020e9ec648"),
    "cifar10-dir": Shipped("cifar10-dir", _CIFAR10),
    "cifar10-at": Shipped("cifar10-dir", _CIFAR10, bare=True),
    "cifar10-small-dir": Shipped("cifar10-small-dir", _SMALL),
    "cifar10-small-at": Shipped("cifar10-small-dir", _SMALL, bare=True),
    "cifar10-small-dir-alpha0": Shipped(
        "cifar10-small-dir-alpha0", "35e11780e49dbc53790937adb476c0c2f4486e6784681b9caeb83682d0a8c6d6"
    ),
    "cifar10-small-hgd": Shipped(
        "cifar10-small-hgd", "493fe2a81576e4a5149a5b0508ce323bec29b20ab513e956639dc7748d615c47"
    ),
    "cifar10-small-apegan": Shipped(
        "cifar10-small-apegan", "9029164421fd9bafa57b5ec723395eeb2f3ba4a3797703bf8f984a1223b21462"
    ),
    "cifar10-small-finetune": Shipped(
        "cifar10-small-finetune", "7ef7ac73acadbb890ef6e4aab4c11cbd780918854871641d9997d0e9eec70bbc"
    ),
    "cifar10-small-jatp": Shipped(
        "cifar10-small-jatp", "d1a847d42bc0fca02c2e8e36cd25edd40693fe9a059224e72963f0cbc04ee321"
    ),
    "cifar10-small-nrp": Shipped(
        "cifar10-small-nrp", "647c8ce42dda1eb229e29dba221548527bd9f1d46e94613e1f45476b740d0211"
    ),
}
"""By DATASET-MODEL, the names of RobustBench's signature."""


def is_shipped(uri: str) -> bool:
    """Whether ``uri`` names a defense of this package."""
    return uri.startswith(PREFIX)


def find(uri: str) -> Shipped:
    """What zoo:NAME names. Raises ConfigError, which lists the names, where there is none of that name."""
    name = uri.removeprefix(PREFIX)
    if name not in ZOO:
        raise ConfigError(f"there is no {PREFIX}{name}; there are {', '.join(PREFIX + each for each in ZOO)}")
    return ZOO[name]


def folder_of(uri: str) -> Path:
    """The folder that holds zoo:NAME. Raises ConfigError where it is missing, or is not the one of the table."""
    found = find(uri)
    folder = HERE / found.folder
    try:
        marker = (folder / "COMMIT").read_text(errors="replace")
    except OSError as error:
        raise ConfigError(
            f"the weights of {uri} are not in this copy of the package: install it on every node, or give a folder"
        ) from error
    if marker != found.sha256:
        raise ConfigError(f"{uri} is damaged: {folder} is not the one that came with this package")
    return folder


def claim_of(uri: str) -> Path:
    """The file that says what zoo:NAME was found to keep. Raises ConfigError for an unknown name."""
    return HERE / find(uri).folder / f"{uri.removeprefix(PREFIX)}.json"


def model_of(name: str, dataset: str, threat: str) -> str | None:
    """The URI of a defense by RobustBench's signature; None where there is none here."""
    found = ZOO.get(f"{dataset}-{name}")
    return None if found is None or found.threat != threat else f"{PREFIX}{dataset}-{name}"


def no_model(name: str, dataset: str, threat: str) -> ConfigError:
    """The error that says what there is instead."""
    there = ", ".join(f"{each} ({found.threat})" for each, found in ZOO.items())
    return ConfigError(
        f"there is no model {name!r} for {dataset}, {threat}: the zoo has DATASET-MODEL {there}, and MLflow's registry"
        f" has no champion of that data set and threat named {name}-{dataset} or {name}"
    )
