"""The finished defense in a folder, and targets given from outside: weights in, modules out, nothing executed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from dircluster.config import ARCHITECTURES, ConfigError, RunConfig, first_line, local_path
from dircluster.defenses.base import Defended
from dircluster.defenses.identity import Identity
from dircluster.defenses.table import DEFENSES, UNNAMED, find_defense
from dircluster.models import classifiers, weight_files, weights
from dircluster.models.modules import TooLargeError, at_most, plain_torch
from dircluster.training import checkpoint, hub_folder
from dircluster.training.stages import trained_stages
from dircluster.zoo import find, folder_of, is_shipped

MOST_TENSORS = 10_000
"""Tensors of weights that a network may have, those of some 800 blocks of a transformer: seconds to count."""


def load_defense_folder(folder: Path, *, trust_code: bool = False) -> Defended:
    """The defense that a run left in ``folder``: on the CPU, in float32, in eval mode, drawing afresh at each call.

    ``folder`` may also be that of the stage around it, or one that :mod:`dircluster.training.hub_folder` wrote. A
    target or a defense of the user's own (package.module) is imported only where ``trust_code`` is set. Raises
    CheckpointError where the folder is missing, damaged, or holds something else.
    """
    facts, tensors = hub_folder.read(folder) if hub_folder.is_one(folder) else _finished(folder)
    try:
        name, wanted = str(facts.get("name", UNNAMED)), str(facts["architecture"])
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
        raise checkpoint.CheckpointError(f"{folder} does not say what defense it holds: {first_line(error)}") from error
    networks: dict[str, nn.Module] = {}
    with plain_torch():
        for part in (defense.purifier, "classifier"):
            if part not in tensors:
                raise checkpoint.CheckpointError(f"{folder} holds no weights of its {part}")
            if not own:
                _check_size(partial(defense.build, run, part), tensors[part], str(folder))
            networks[part] = defense.build(run, part)
            _load(networks[part], tensors[part], str(folder))
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


PLACES = (
    "a defense is the folder of a finished stage or of an export, here or in s3://, zoo:NAME, or models:/NAME@champion;"
    " a classifier's weights alone are for --target.uri"
)
"""Where a defense is: the way out for who names something else."""


def _finished(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a finished defense is, and its weights by network."""
    place = checkpoint.finished(folder)
    inside = sorted(folder.glob("*/final")) if checkpoint.digest(place) is None else []
    if inside:
        names = ", ".join(str(each.relative_to(folder)) for each in inside if checkpoint.digest(each) is not None)
        raise checkpoint.CheckpointError(
            f"{folder} holds no committed checkpoint; it is the storage of runs, name one of its finished stages:"
            f" {names or 'there is none'}"
        )
    if checkpoint.digest(place) is None:
        what = "is a file" if folder.is_file() else "holds no committed checkpoint"
        raise checkpoint.CheckpointError(f"{folder} {what}: {PLACES}")
    found = checkpoint.read(place)
    facts = found.state.get("defense")
    if not isinstance(facts, dict):
        raise checkpoint.CheckpointError(f"{folder} holds no finished defense (it is a {found.state.get('stage')})")
    return facts, found.tensors


def _check_size(build: Callable[[], nn.Module], tensors: dict[str, Tensor], source: str) -> None:
    """Raise ConfigError where a network would be larger than its stored weights, before memory is asked for."""
    most = sum(value.numel() for value in tensors.values())
    if _is_larger(build, 2 * most + 1000, own=True):
        raise ConfigError(f"{source} describes a network larger than its {most:,} stored weights")


def _is_larger(build: Callable[[], nn.Module], numbers: int, own: bool) -> bool:
    """Whether a network holds more than so many numbers: it is made without memory, up to there.

    Where ``own``, it is this package's, and whatever PyTorch says is of its sizes; others may fail without memory.
    """
    try:
        with torch.device("meta"), at_most(numbers, MOST_TENSORS):
            build()
    except TooLargeError:
        return True
    except (TypeError, RuntimeError, OverflowError, MemoryError):  # PyTorch's, of sizes that none has
        return own
    return False


def check_sizes(config: RunConfig, numbers: int) -> None:
    """Raise ConfigError where a network of the run holds more than so many numbers, before memory is asked for.

    Targets that are made by somebody else's code are not counted.
    """
    defense, target = find_defense(config.defense), config.target
    counted = target.architecture in ARCHITECTURES and not (target.uri or "").startswith("timm:")
    for name in (*defense.modules(config), *(("classifier",) if counted else ())):
        if _is_larger(partial(defense.build, config, name), numbers, own=config.defense in DEFENSES):
            raise ConfigError(
                f"the {name} that the settings describe has more than {numbers:,} numbers or {MOST_TENSORS:,} tensors,"
                " which there is no place for: give smaller sizes, see --model and --data.classes"
            )


def check_statistics(config: RunConfig) -> None:
    """Raise ConfigError where a network that is trained would normalize a single number: a micro-batch of one image
    whose map has a single pixel.

    Targets that are made by somebody else's code are not asked.
    """
    if config.training.fewest > 1 or config.scaling.least > 1:  # several workers normalize over the global batch
        return
    data = config.data
    for stage in trained_stages(config):
        for name in stage.optimizers if stage.epochs else ():
            if name == "classifier" and config.target.architecture not in ARCHITECTURES:
                continue
            with torch.device("meta"):
                network = find_defense(config.defense).build(config, name).train()
                normalized = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
                try:
                    if normalized:
                        network(torch.zeros(1, data.channels, data.height, data.width))
                except ValueError as error:
                    if "more than 1 value per channel" in str(error):
                        raise ConfigError(
                            f"training.microbatch {config.training.microbatch or config.training.batch_size} lets one"
                            f" image of {config.training.batch_size} pass alone, whose maps of a single pixel the"
                            f" {name} cannot normalize: let two or more pass"
                        ) from error
                except Exception:  # it takes other inputs than images: not checked
                    continue


def check_made(config: RunConfig) -> None:
    """Raise ConfigError where the target that the run would train cannot be made, or begun with."""
    with plain_torch():
        made = find_defense(config.defense).build(config, "classifier")
    check_begins(made, config)


def check_begins(classifier: nn.Module, config: RunConfig) -> None:
    """Raise ConfigError where the run's target, with its first weights, cannot take its images or be trained."""
    given = config.target.uri is not None  # then these weights are replaced, and may be anything
    defense = find_defense(config.defense)
    classifiers.check_classes(classifier, config.data)
    if config.target.architecture not in ARCHITECTURES:  # those of this package can be differentiated
        classifiers.check_usable(classifier, config.data)
        if classifiers.draws(classifier, config.data) and defense.build(config, defense.purifier).randomized:
            raise ConfigError(
                f"target.architecture {config.target.architecture!r} draws at random, and so does the purifier: what an"
                " attacker knows of such draws could not be held fixed"
            )
    for stage in defense.stages(config):
        trains = "classifier" in stage.optimizers and stage.epochs > 0 and not (given and stage.name == "target")
        if trains and not any(parameter.requires_grad for parameter in classifier.parameters()):
            raise ConfigError(
                f"stage {stage.name} trains the target, but none of its parameters requires a gradient: see what"
                f" target.architecture {config.target.architecture!r} makes"
            )
    if not given:
        weights.check_numbers(dict(classifier.named_parameters()), "the target")
        classifiers.finite_logits(classifier, config.data, 1)


@dataclass(frozen=True)
class GivenTarget:
    """The classifier that ``target.uri`` names, on the CPU."""

    classifier: nn.Module
    sha256: str
    """Of the file; of the manifest where it is the folder of a checkpoint; of the weights where timm has them."""
    notes: list[str]
    """How it was taken, a line each."""


def given_target(config: RunConfig, open_path: Callable[[str], Path] = local_path) -> GivenTarget:
    """The classifier that ``target.uri`` names: timm:NAME, zoo:NAME, a file of weights, or a folder that
    a run left.

    Raises ConfigError where it cannot be had, does not fit ``config.data``, or is dead.
    """
    uri, notes = config.target.uri, list[str]()
    assert uri is not None
    if uri.startswith("timm:"):
        classifier = classifiers.build(uri, config.data, pretrained=True, normalization=config.target.normalization)
        sha = hashlib.sha256(dump_tensors(checkpoint.storable(classifier.state_dict()))).hexdigest()
    else:
        with plain_torch():
            classifier = find_defense(config.defense).build(config, "classifier")
        found, sha = _target_tensors(folder_of(uri) if is_shipped(uri) else open_path(uri))
        notes = weights.load_weights(classifier, found, config.target, config.data, f"target.uri {uri!r}")
    classifiers.check_classes(classifier, config.data)
    classifiers.check_alive(classifier, config.data)
    return GivenTarget(classifier, sha, notes)


def load_target(config: RunConfig, open_path: Callable[[str], Path] = local_path) -> nn.Module:
    """The module of :func:`given_target`."""
    return given_target(config, open_path).classifier


def _target_tensors(path: Path) -> tuple[Any, str]:
    """Weights of the file or folder, as plain data, and their SHA-256."""
    source = f"target.uri {str(path)!r}"
    if path.is_dir():
        place = checkpoint.finished(path)
        groups = hub_folder.read(path)[1] if hub_folder.is_one(path) else checkpoint.read(place).tensors
        if "classifier" not in groups:
            raise ConfigError(f"{source} holds no classifier")
        sha = checkpoint.digest(place) or hashlib.sha256(dump_tensors(groups["classifier"])).hexdigest()
        return groups["classifier"], sha
    if not path.is_file():
        raise ConfigError(f"{source} does not exist")
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror or first_line(error)}") from error
    return weight_files.parse(blob, source), hashlib.sha256(blob).hexdigest()


def _load(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load ``tensors`` into ``module``. Raises ConfigError where they do not fit or are not finite."""
    if wrong := weights.misfit(tensors, module.state_dict()):
        raise ConfigError(f"{source} does not fit the model: {wrong}")
    weights.check_numbers(tensors, source)
    with torch.no_grad():
        module.load_state_dict(tensors, strict=False)
