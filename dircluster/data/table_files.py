"""Which parquet files are the training and the test split."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from dircluster.config import ConfigError
from dircluster.data.files import Found, one_line
from dircluster.data.set_names import set_names
from dircluster.data.split_names import SplitName, instead_of_test, split_name


@dataclass(frozen=True)
class _Placed:
    """A file, its split ("" where no name says one) and the folder that says so, if it is one; names of no values."""

    file: Found
    split: str
    folder: str
    base: tuple[str, ...]
    """Folders above the one that says the split, or above the file."""
    below: tuple[str, ...]
    """Names from there on."""


def table_splits(
    files: Iterable[Found], uri: str, labels: Collection[str]
) -> tuple[list[Path], list[Path], tuple[str, ...]]:
    """Files of the training and of the test split, in their order, and notes on them.

    Folders called as ``labels`` (label=3) say no split.

    Raises ConfigError where two sets of files could be a split, or where files belong to no split.
    """
    by_split: dict[str, list[_Placed]] = {}
    for file in files:
        placed = _placed(file, labels)
        by_split.setdefault(placed.split, []).append(placed)
    nameless = by_split.pop("", [])
    if nameless and "train" in by_split:
        raise ConfigError(
            f"{nameless[0].file.path} says by no name which split it is, and data.uri {uri!r} has"
            f" {by_split['train'][0].file.path.name} to train on: rename it (train*, test*, extra*) or move it away"
        )
    train, test = by_split.get("train", nameless), by_split.get("test", by_split.get("val", []))
    for split in (train, test):
        _check_twice(split)
        if len(names := _names(split)) > 1:
            some = one_line(names[:5]) + ", ..." * (len(names) > 5)
            alike = len({re.sub(r"\d+", "", name) for name in names}) == 1 and "*" not in names[0]
            hint = " (shards of one set are numbered from 0 without a gap)" if alike else ""
            raise ConfigError(
                f"data.uri {uri!r} has {len(names)} sets of files for one split: {some};"
                f" name one of them extra-*, or move it away{hint}"
            )
    if len(bases := sorted({"/".join(placed.base) for placed in (*train, *test)})) > 1:
        some = ", ".join(repr(base or ".") for base in bases[:3])
        raise ConfigError(f"data.uri {uri!r} holds several data sets ({some}): give the folder of one")
    paths = [[placed.file.path for placed in split] for split in (train, test)]
    instead = [instead_of_test(paths[1][0].name)] if test and "test" not in by_split else []
    return paths[0], paths[1], (*_missing_shards([*paths[0], *paths[1]]), *instead)


def _check_twice(split: Iterable[_Placed]) -> None:
    """Raise ConfigError where two files differ in letters' size, separators or the suffix alone (train.pq)."""
    seen: dict[str, Path] = {}
    for path in (placed.file.path for placed in split):
        bare = re.sub(r"[\W_]+", " ", str(path.with_suffix("")).lower())
        if bare in seen:
            raise ConfigError(f"{seen[bare]} and {path.name} may be one file twice: rename one, or move it away")
        seen[bare] = path


def _missing_shards(files: Iterable[Path]) -> list[str]:
    """A line for each set of files NAME-i-of-n that is not whole."""
    seen: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*?)-?(\d+)-of-(\d+)\b.*", file.name):
            seen.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    return [
        f"{len(have)} of {all_} shards of {name} are there" for (name, all_), have in seen.items() if len(have) < all_
    ]


def _placed(file: Found, labels: Collection[str]) -> _Placed:
    """By its own name or that of a folder; names that say nothing but a split come first, then outer ones."""
    parts = [*file.folders, file.path.stem]
    said = [(i, found) for i, part in enumerate(parts) if (found := _said(part, file, labels))]
    plain = [(i, found) for i, found in said if found.plain] or said
    if len({found.split for _, found in plain}) > 1:
        raise ConfigError(
            f"{file.path}: {parts[plain[0][0]]!r} says another split than {parts[plain[-1][0]]!r}; rename one"
        )
    index, split = (plain[0][0], plain[0][1].split) if plain else (len(parts) - 1, "")
    folder = parts[index] if index < len(parts) - 1 else ""
    return _Placed(file, split, folder, _no_values(parts[:index]), _no_values(parts[index + bool(folder) :]))


def _names(split: Iterable[_Placed]) -> list[str]:
    """The sets that files belong to: shards have one name, and files that are called by a hash too."""
    placed = list(split)
    below = set_names(["/".join(one.below) for one in placed])
    return sorted(
        {"/".join(filter(None, (one.folder, name or "..."))) for one, name in zip(placed, below, strict=True)}
    )


def _said(part: str, file: Found, labels: Collection[str]) -> SplitName | None:
    """The split that a name says, or the value of a folder NAME=VALUE, but for one that holds a label (label=3)."""
    if not (match := re.fullmatch(r"(\w+)=(.*)", part, re.DOTALL)):
        return split_name(part)
    name, value = match[1], match[2]
    if name.lower() in labels or name in labels:
        return None
    if split_name(name) and value.lower() in ("0", "1", "true", "false", "yes", "no"):
        raise ConfigError(f"{file.path}: {part!r} may say a split; call the folder split=train, split=test or extra")
    return split_name(value)


def _no_values(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if not re.fullmatch(r"\w+=.*", part, re.DOTALL))
