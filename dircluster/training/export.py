"""The finished defense in a folder, and targets given from outside: weights in, modules out, nothing executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn

from dircluster.config import ConfigError, RunConfig, local_path
from dircluster.defenses.base import Defended
from dircluster.defenses.identity import Identity
from dircluster.defenses.table import DEFENSES, find_defense
from dircluster.models import classifiers
from dircluster.models.weights import check_weights
from dircluster.training import checkpoint
from dircluster.zoo import find, folder_of, is_shipped


def load_defense_folder(folder: Path, *, trust_code: bool = False) -> Defended:
    """The defense that a run left in ``folder``: on the CPU, in eval mode, drawing afresh at each call.

    A target or a defense of the user's own (package.module) is imported only where ``trust_code`` is set. Raises
    CheckpointError where the folder is missing, damaged, or holds something else.
    """
    found = checkpoint.read(folder)
    facts = found.state.get("defense")
    if facts is None:
        raise checkpoint.CheckpointError(f"{folder} holds no finished defense (it is a {found.state.get('stage')})")
    try:
        name, wanted = str(facts.get("name", "dir")), str(facts["architecture"])
        own = [text for text in (wanted,) if ":" in text and not text.startswith("timm:")]
        own += [] if name in DEFENSES else [name]
        if own and not trust_code:
            raise checkpoint.CheckpointError(
                f"{folder} wants to import {own[0]!r}: say that its code is trusted (trust_code=True, --trust-code)"
            )
        defense = find_defense(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise checkpoint.CheckpointError(f"{folder} does not say what defense it holds: {error}") from error
    try:
        run = defense.from_plain(facts)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{folder} does not say what defense it holds: {error}") from error
    networks = {name: defense.build(run, name) for name in (defense.purifier, "classifier")}
    for name, network in networks.items():
        _load(network, found.tensors[name], str(folder))
    return defense.defended(run, networks).eval()


def load_shipped(uri: str) -> Defended:
    """The defense that comes with this package as ``uri``, zoo:NAME; a target alone stands behind nothing.

    Raises ConfigError where there is none of that name, and CheckpointError where it is damaged.
    """
    made = load_defense_folder(folder_of(uri))
    if not find(uri).bare:
        return made
    bare = Defended(Identity(), made.classifier, "identity")
    bare.image_shape = made.image_shape
    return bare.eval()


def load_target(config: RunConfig, open_path: Callable[[str], Path] = local_path) -> nn.Module:
    """The classifier that ``target.uri`` names: timm:NAME, zoo:NAME, a safetensors file, or a folder that a run left.

    Raises ConfigError where it cannot be had or does not fit ``config.data``.
    """
    uri = config.target.uri
    assert uri is not None
    if uri.startswith("timm:"):
        classifier = classifiers.build(uri, config.data, pretrained=True)
    else:
        classifier = find_defense(config.defense).build(config, "classifier")
        place = folder_of(uri) if is_shipped(uri) else open_path(uri)
        _load(classifier, _target_tensors(place), uri)
    check_weights(classifier, f"target.uri {uri!r}")
    classifiers.check_classes(classifier, config.data)
    return classifier


def _target_tensors(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        groups = checkpoint.read(path).tensors
        if "classifier" not in groups:
            raise ConfigError(f"target.uri {str(path)!r} holds no classifier")
        return groups["classifier"]
    if not path.is_file():
        raise ConfigError(f"target.uri {str(path)!r} does not exist")
    try:
        return parse_tensors(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"target.uri {str(path)!r} is not a sound safetensors file: {error}") from error


def _load(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load into ``module``, or into its ``network`` where the tensors are those of a bare classifier."""
    own = module.state_dict()
    inner = getattr(module, "network", None)
    if isinstance(inner, nn.Module) and set(tensors) == set(inner.state_dict()):
        module, own = inner, inner.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        name = (missing or unknown)[0]
        raise ConfigError(f"{source} does not fit the model: {name!r} is {'missing' if missing else 'unknown'}")
    for name, value in sorted(tensors.items()):
        if value.shape != own[name].shape:
            raise ConfigError(
                f"{source} does not fit the model: {name!r} is {tuple(value.shape)}, not {tuple(own[name].shape)};"
                " check data.classes, data.channels and the architecture"
            )
    with torch.no_grad():
        module.load_state_dict(tensors)
