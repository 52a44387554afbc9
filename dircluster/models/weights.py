"""Weights that somebody made elsewhere, brought into a network: names fitted, numbers and normalization checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dircluster.config import LEAST_STD, ConfigError, DataConfig, TargetConfig
from dircluster.models.classifiers import ARCHITECTURES, Normalized, build
from dircluster.models.elsewhere import Normalization
from dircluster.models.layouts import UNSAID, renamed
from dircluster.models.weight_files import SAVE, StateDict, parts, state_dicts, unwrapped_names, without_normalization


def _unwrapped(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """Names without 0, 1, 2, ... first parts that all of them have in common: the new name -> the one in the file."""
    names = {name: name for name in tensors}
    while names:
        yield names
        firsts = {name.partition(".")[0] for name in names}
        if len(firsts) > 1 or any("." not in name for name in names):
            return
        names = {name.partition(".")[2]: old for name, old in names.items()}


@dataclass(frozen=True)
class Fit:
    """How names of a file fit a network: by the network's name, the file's; and what does not fit, if anything."""

    names: dict[str, str]
    wrong: str = ""
    renamed: bool = False
    common: int = 0
    """Names of the file that the network knows."""


def _fit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], architecture: str) -> Fit:
    """The best way to take ``tensors`` for ``own``."""
    best = Fit({}, "it holds no weights")
    for names in _unwrapped(tensors):
        table = renamed(names, architecture)
        for new, is_renamed in ((names, False), ({b: names[a] for a, b in (table or {}).items()}, True)):
            wrong = misfit({name: tensors[old] for name, old in new.items()}, own)
            if not wrong:
                return Fit(new, renamed=is_renamed)
            common = len(set(new) & set(own))
            if not best.names or common > best.common:
                best = Fit(new, wrong, common=common)
    return best


def misfit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What is missing, unknown, or of another shape or kind; counters of batches may be missing."""
    missing = sorted(name for name in set(own) - set(tensors) if not name.endswith("num_batches_tracked"))
    unknown = sorted(set(tensors) - set(own))
    if missing or unknown:
        return f"{(missing or unknown)[0]!r} is {'missing' if missing else 'unknown'}"
    for name, value in sorted(tensors.items()):
        if value.shape != own[name].shape:
            return (
                f"{name!r} is {tuple(value.shape)}, not {tuple(own[name].shape)}; check data.classes, data.channels and"
                " the architecture"
            )
        if own[name].is_floating_point() and not (value.is_floating_point() and value.layout == torch.strided):
            return f"{name!r} is {value.dtype}, {value.layout}: quantized and sparse weights are not taken"
    return ""


def load_weights(network: nn.Module, found: Any, target: TargetConfig, data: DataConfig, source: str) -> list[str]:
    """Load what :func:`parse` gave into the target ``network``: -> what has to be said of it, a line each.

    Raises ConfigError where it does not fit, where several sets could be meant, where weights are dead, and where
    nothing says how images are normalized.
    """
    try:
        sets = state_dicts(found)
    except RecursionError:
        raise ConfigError(f"{source} holds weights too deep in itself: save them alone by {SAVE}") from None
    if not sets:
        raise ConfigError(f"{source} holds no weights (tensors by name): save them by {SAVE}")
    if target.entry is not None:
        named = [one for each in sets for one in (each, *parts(each))]
        sets = [one for one in named if one.entry == target.entry] or _no_entry(source, target.entry, sets)
    fits = [(one, fit) for one in sets if not (fit := _fit_of(network, one, target.architecture)[0]).wrong]
    if not fits:
        raise ConfigError(_misfits(network, sets, target, data, source))
    for name, value in ((name, value) for one, _ in fits for name, value in one.tensors.items()):
        if value.is_meta:
            raise ConfigError(f"{source} holds {name!r} on the meta device, without values: save it once it is loaded")
    chosen = fits[0][0]
    if any(not _same(chosen, other) for other, _ in fits[1:]):
        names = ", ".join(one.entry or "''" for one, _ in fits)
        raise ConfigError(f"{source} holds several sets of weights ({names}): choose with --target.entry NAME")
    fit, module, inner = _fit_of(network, chosen, target.architecture)
    own = unwrapped_names(module.state_dict())
    tensors = {own[name]: inner.tensors[old] for name, old in fit.names.items()}
    check_numbers(tensors, source, zeros=True)
    with torch.no_grad():
        module.load_state_dict(tensors, strict=False)
    notes = [f"its weights are those of entry {chosen.entry!r}"] if chosen.entry else []
    if fit.renamed and target.architecture in UNSAID:
        notes.append(UNSAID[target.architecture])
    return notes + _normalize(network, module is network, inner.normalizations, target, source)


def _fit_of(network: nn.Module, found: StateDict, architecture: str) -> tuple[Fit, nn.Module, StateDict]:
    """How weights fit, into which module, and which of them: those of all of ``network``, or of what it normalizes."""
    whole = _fit(found.tensors, _own(network), architecture)
    if not whole.wrong:
        return whole, network, found
    inner = network.network if isinstance(network, Normalized) else network
    bare = without_normalization(found)
    fit = _fit(bare.tensors, _own(inner), architecture)
    return (whole, network, found) if fit.wrong and whole.common > fit.common else (fit, inner, bare)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """What ``module`` holds, by names without the parts that wrappers put in."""
    state = module.state_dict()
    return {name: state[wrapped] for name, wrapped in unwrapped_names(state).items()}


def _same(one: StateDict, other: StateDict) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(value, other.tensors[name]) for name, value in one.tensors.items()
    )


def _no_entry(source: str, entry: str, sets: list[StateDict]) -> NoReturn:
    there = ", ".join(one.entry or "''" for one in sets)
    raise ConfigError(f"{source} holds no weights under --target.entry {entry}; there are: {there}")


def _misfits(network: nn.Module, sets: list[StateDict], target: TargetConfig, data: DataConfig, source: str) -> str:
    """What does not fit, and which part of it, or which architecture, does."""
    architecture = target.architecture
    wrong = _fit_of(network, sets[0], architecture)[0].wrong
    held = [part.entry for one in sets for part in parts(one) if not _fit_of(network, part, architecture)[0].wrong]
    if held:
        return (
            f"{source} does not fit the model: {wrong}; if a part of it is the whole network, name that by"
            f" --target.entry {' or '.join(held)}"
        )
    for name in ARCHITECTURES if architecture in ARCHITECTURES else ():
        with torch.device("meta"):
            other = build(name, data)
        if any(not _fit_of(other, one, name)[0].wrong for one in sets):
            return f"{source} does not fit {architecture}: it fits --target.architecture {name}"
    return f"{source} does not fit the model: {wrong}"


def check_numbers(tensors: Mapping[str, Tensor], source: str, zeros: bool = False) -> None:
    """Raise ConfigError where a tensor is not finite or, with ``zeros``, where the weights of a layer are all zero."""
    for name, value in sorted(tensors.items()):
        if value.is_floating_point() and not value.isfinite().all():
            raise ConfigError(f"{source} holds numbers that are not finite (NaN or infinity) in {name!r}")
        if zeros and value.ndim >= 2 and name.endswith("weight") and value.numel() and not value.any():
            raise ConfigError(f"{source} holds nothing but zeros in {name!r}: its network is dead")


def _normalize(
    network: nn.Module, loaded: bool, stated: tuple[Normalization, ...], target: TargetConfig, source: str
) -> list[str]:
    """Bring what a file says of normalization and the settings together; ``loaded``: it came with the weights too."""
    given, ask = target.normalization, "--target.mean M ... --target.std S ..."
    if isinstance(network, Normalized) and loaded:
        stated = (tuple(network.mean.flatten().tolist()), tuple(network.std.flatten().tolist())), *stated
    found = next((one for one in stated if given is not None and _agree(one, given)), stated[0] if stated else None)
    if given is None and (other := next((one for one in stated[1:] if not _agree(one, stated[0])), None)):
        raise ConfigError(
            f"{source} says mean {_text(stated[0][0])} and std {_text(stated[0][1])}, and in another place mean"
            f" {_text(other[0])} and std {_text(other[1])}: say which by {ask}"
        )
    if isinstance(network, Normalized):
        if found is None and given is None:
            raise ConfigError(
                f"{source} does not say how images are normalized: give the mean and std that it was trained with,"
                f" {ask} (0 and 1 for images in [0, 1] as they are)"
            )
        if found is not None:
            _check_normalization(found, source, network.mean.numel(), ask)
            if given is not None and not _agree(found, given):
                raise ConfigError(
                    f"{source} has mean {_text(found[0])} and std {_text(found[1])} of its own: leave --target.mean and"
                    " --target.std out"
                )
            for buffer, values in zip((network.mean, network.std), found, strict=True):
                buffer.copy_(torch.tensor(values, dtype=buffer.dtype).view(1, -1, 1, 1).expand_as(buffer))
        return [f"images are normalized by mean {_text(network.mean.flatten().tolist())},"
                f" std {_text(network.std.flatten().tolist())}"]  # fmt: skip
    if found is not None:
        _check_normalization(found, source, len(found[0]), ask)
        raise ConfigError(
            f"{source} has a mean and std that {target.architecture} has no place for: put them in front by"
            f" --target.mean {_text(found[0])} --target.std {_text(found[1])}, or save the weights without them where"
            " the network normalizes images itself"
        )
    if target.architecture.startswith("torchvision."):
        raise ConfigError(
            f"{source} does not say how images are normalized, and {target.architecture} does it nowhere: give the mean"
            f" and std that it was trained with, {ask} (0 and 1 for images in [0, 1] as they are)"
        )
    return [
        f"{target.architecture} is taken to normalize images in [0, 1] itself; if not, give target.mean and target.std"
    ]


def _check_normalization(found: Normalization, source: str, channels: int, ask: str) -> None:
    mean, std = found
    if any(not (value >= LEAST_STD) for value in std):
        raise ConfigError(f"{source} has a std of {_text(std)}: it must be at least {LEAST_STD}; the file is not sound")
    for name, values in (("mean", mean), ("std", std)):
        if any(not (0 <= value <= 1) for value in values):
            raise ConfigError(
                f"{source} has {name} {_text(values)}, not one of images in [0, 1]: its network takes others"
            )
    if {len(mean), len(std)} - {1, channels}:
        raise ConfigError(f"{source} has mean and std of {len(mean)} channels, but data.channels is {channels}")


def _agree(one: Normalization, other: Normalization) -> bool:
    """Whether both say the same, up to the rounding of float32; one number stands for all channels."""
    for mine, yours in zip(one, other, strict=True):
        size = max(len(mine), len(yours))
        if {len(mine), len(yours)} - {1, size} or 0 in (len(mine), len(yours)):
            return False
        pairs = zip(mine * (size // len(mine)), yours * (size // len(yours)), strict=True)
        if any(not abs(a - b) <= 1e-6 for a, b in pairs):
            return False
    return True


def _text(values: Any) -> str:
    return " ".join(f"{value:.6g}" for value in values)
