"""Files of weights that somebody made elsewhere: read without running code, and sets of weights found in them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor

from dircluster.config import ConfigError, first_line
from dircluster.files import FETCH, POINTER
from dircluster.models.elsewhere import Normalization

SAVE = "torch.save(model.state_dict(), 'weights.pt')"
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that DataParallel, torch.compile and the like put in."""
MEANS = ("mean", "mu", "means", "_mean", "image_mean", "pixel_mean", "norm_mean")
STDS = ("std", "sigma", "stds", "_std", "image_std", "pixel_std", "norm_std")
"""What the buffers of a normalization are called, pairwise."""
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
    *((getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")  # type: ignore[attr-defined]
      for name in ("scalar", "_reconstruct") for core in ("core", "_core")),
    np.ndarray,
]  # fmt: skip
"""What files of weights often hold besides: accuracies as NumPy's numbers, and the options of the training."""


def parse(blob: bytes, source: str) -> Any:
    """What a .safetensors, .pt or .pth holds, as plain data and tensors on the CPU. Nothing that is read can execute.

    Raises ConfigError, one line, where it is damaged, or holds objects instead of weights. The zip form of torch.save
    has a checksum of each record, which torch.load does not look at; the old form has none.
    """
    if blob.startswith(POINTER):
        raise ConfigError(f"{source} {FETCH}")
    if not blob.startswith((b"PK\x03\x04", b"\x80")):
        try:
            return parse_tensors(blob)
        except SafetensorError as error:
            raise ConfigError(f"{source} is not a sound safetensors file, nor one of torch.save: {error}") from error
    if blob.startswith(b"PK") and (record := _damaged_record(blob)):
        raise ConfigError(f"{source} is not a sound file of weights: {record} is damaged; copy it again")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        text = str(error)
        if "TorchScript" in text:
            raise ConfigError(f"{source} is a TorchScript program, not weights: save them by {SAVE}") from None
        if found := re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:class|type) ([\w.]+)", text):
            raise ConfigError(
                f"{source} holds a pickled object ({found[1]}), which could run code, not weights alone: where that"
                f" code is trusted, load it and save the weights by {SAVE}"
            ) from None
        reason = first_line(error).partition(". ")[0]
        raise ConfigError(f"{source} is not a sound file of weights: {reason}") from None


def _damaged_record(blob: bytes) -> str:
    """The record of a zip file that is not what its checksum says, the first one; "" where all are.

    Files that were saved without checksums (torch.serialization.set_crc32_options) have zero for all of them.
    """
    reached = "its table of records"
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as records:
            if any(record.CRC for record in records.infolist()):
                for name in records.namelist():
                    reached = f"record {name!r}"
                    with records.open(name) as record:
                        while record.read(2**20):
                            pass
    except MemoryError:
        raise
    except Exception:  # a damaged file may raise anything
        return reached
    return ""


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, without the parts that wrappers put in, and what a file says of them."""

    tensors: dict[str, Tensor]
    entry: str = ""
    """Where in the file they stand."""
    normalizations: tuple[Normalization, ...] = ()
    """Each mean and std that stand among them or beside them."""


def state_dicts(found: Any, entry: str = "") -> list[StateDict]:
    """All sets of weights in what :func:`parse` gives, whatever they stand under."""
    if isinstance(found, list | tuple):
        found = {str(number): inner for number, inner in enumerate(found)}
    if not isinstance(found, Mapping):
        return []
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)}
    weights = any(value.ndim >= 2 for name, value in tensors.items() if name.rpartition(".")[2] not in (*MEANS, *STDS))
    made = [_cleaned(tensors, entry)] if weights else []
    beside = _pairs(found)
    for name, inner in found.items():
        if isinstance(name, str) and not name.startswith(("optim", "sched")):
            for one in state_dicts(inner, f"{entry}.{name}".strip(".")):
                made.append(StateDict(one.tensors, one.entry, one.normalizations + beside))
    return made


def parts(found: StateDict) -> list[StateDict]:
    """The weights by the part that their names begin with, set by set: model.*, teacher.*, loss.*.

    A mean and std that belong to none of them are of all.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in found.tensors.items():
        groups.setdefault(name.partition(".")[0], {})[name] = value
    common: dict[str, Tensor] = {}
    for first, group in list(groups.items()):
        lasts = {name.rpartition(".")[2]: value for name, value in group.items()}
        if lasts.keys() <= {*MEANS, *STDS}:
            common |= lasts
            del groups[first]
    stated = _pairs(common) + found.normalizations
    return [StateDict(group, f"{found.entry}.{first}".strip("."), stated) for first, group in groups.items()]


def _cleaned(tensors: Mapping[str, Tensor], entry: str) -> StateDict:
    tensors = {k: v for k, v in tensors.items() if k.rpartition(".")[2] != "n_averaged"}
    return StateDict({new: tensors[old] for new, old in unwrapped_names(tensors).items()}, entry)


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Each of ``names`` by what it is without the parts that wrappers put in; by itself where two would be one."""
    given = list(names)
    made = {".".join(part for part in name.split(".") if part not in WRAPPERS): name for name in given}
    return {name: name for name in given} if len(made) < len(given) or "" in made else made


def _pairs(found: Mapping[str, Any]) -> tuple[Normalization, ...]:
    """Each mean and std by any of their names, as numbers."""
    made = list[Normalization]()
    for names in zip(MEANS, STDS, strict=True):
        if all(name in found for name in names):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                mean, std = (torch.as_tensor(found[name], dtype=torch.float64).flatten().tolist() for name in names)
                made.append((tuple(mean), tuple(std)))
    return tuple(made)


def without_normalization(found: StateDict) -> StateDict:
    """The weights apart from the mean and std among them."""
    for mean, std in zip(MEANS, STDS, strict=True):
        for name in found.tensors:
            before, dot, last = name.rpartition(".")
            other = f"{before}{dot}{std}"
            if last == mean and other in found.tensors:
                own = _pairs({mean: found.tensors[name], std: found.tensors[other]})
                rest = {k: v for k, v in found.tensors.items() if k not in (name, other)}
                return StateDict(rest, found.entry, own + found.normalizations)
    return found
