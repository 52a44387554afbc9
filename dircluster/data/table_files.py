"""Which parquet files are the training and the test split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dircluster.config import ConfigError
from dircluster.data.files import Found
from dircluster.data.split_names import split_name, words


@dataclass(frozen=True)
class _Placed:
    """A file, its split ("" where no name says one), the set of files that it belongs to, and where that lies."""

    file: Found
    split: str
    name: str
    base: tuple[str, ...]


def table_splits(files: Iterable[Found], uri: str) -> tuple[list[Path], list[Path]]:
    """Files of the training and of the test split, in their order.

    Raises ConfigError where two sets of files could be a split, or where files belong to no split.
    """
    by_split: dict[str, list[_Placed]] = {}
    for file in files:
        placed = _placed(file)
        by_split.setdefault(placed.split, []).append(placed)
    nameless = by_split.pop("", [])
    if nameless and "train" in by_split:
        raise ConfigError(
            f"{nameless[0].file.path} says by no name which split it is, and data.uri {uri!r} has"
            f" {by_split['train'][0].file.path.name} to train on: rename it (train*, test*, extra*) or move it away"
        )
    train, test = by_split.get("train", nameless), by_split.get("test", by_split.get("val", []))
    for split in (train, test):
        if len(names := sorted({placed.name for placed in split})) > 1:
            raise ConfigError(
                f"data.uri {uri!r} has {len(names)} sets of files for one split: {', '.join(names)};"
                " name one of them extra-*, or move it away"
            )
    if len(bases := sorted({"/".join(placed.base) for placed in (*train, *test)})) > 1:
        some = ", ".join(repr(base or ".") for base in bases[:3])
        raise ConfigError(f"data.uri {uri!r} holds several data sets ({some}): give the folder of one")
    return [placed.file.path for placed in train], [placed.file.path for placed in test]


def missing_shards(files: Iterable[Path]) -> list[str]:
    """A line for each set of files NAME-i-of-n that is not whole."""
    seen: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*?)-?(\d+)-of-(\d+)\b.*", file.name):
            seen.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    return [
        f"{len(have)} of {all_} shards of {name} are there" for (name, all_), have in seen.items() if len(have) < all_
    ]


def _placed(file: Found) -> _Placed:
    """By its own name or that of a folder; names that say nothing but a split come first, then outer ones."""
    parts = [*file.folders, file.path.stem]
    said = [(i, found) for i, part in enumerate(parts) if not _is_value(part) and (found := split_name(part))]
    plain = [(i, found) for i, found in said if found.plain] or said
    if len({found.split for _, found in plain}) > 1:
        raise ConfigError(
            f"{file.path}: {parts[plain[0][0]]!r} says another split than {parts[plain[-1][0]]!r}; rename one"
        )
    index, split = (plain[0][0], plain[0][1].split) if plain else (len(parts) - 1, "")
    name = parts[index] if index < len(parts) - 1 else " ".join(words(parts[-1]))
    return _Placed(file, split, name, tuple(part for part in parts[:index] if not re.fullmatch(r"\w+=.*", part)))


def _is_value(part: str) -> bool:
    """Whether a folder holds a column's value (label=3), which is no name of a split."""
    return re.fullmatch(r"(?!split=|subset=|partition=)\w+=.*", part.lower()) is not None
