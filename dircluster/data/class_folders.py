"""Which images are of which class and split, by the folders that they lie in.

A class is a folder of images, or a folder whose images lie in one called ``images``. Splits are folders of classes.
A split without classes takes its labels from SPLIT_annotations.txt (Tiny ImageNet), or is left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dircluster.config import ConfigError, first_line
from dircluster.data.files import IMAGE_SUFFIXES, SIDE_SUFFIXES, Found, Listing, one_line
from dircluster.data.split_names import instead_of_test, split_name

_READ = ", ".join(sorted(IMAGE_SUFFIXES))
PLAIN_FOLDERS = {"images", "image", "imgs", "img", "jpegimages"}
"""Folders that say nothing about the images in them, in lower case."""
_MASK = re.compile(r"[\s_.-]+(?:masks?|seg|segmentation|gt|groundtruth|labels?)(?:[\s_.-]*\d+)?\Z", re.IGNORECASE)
"""What the name of a mask has behind that of its image."""


@dataclass(frozen=True)
class ClassFolders:
    """Images of both splits with the names of their classes, and all names in the order of their labels."""

    train: list[tuple[Path, str]]
    test: list[tuple[Path, str]]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Placed:
    file: Found
    base: tuple[str, ...]
    """Folders down to the one that holds classes."""
    split: str
    name: str
    inner: tuple[str, ...]


def class_folders(found: Listing, uri: str) -> ClassFolders:
    """Raises ConfigError where it is not plain which folders are classes, or where one has no image."""
    by_split: dict[str, list[_Placed]] = {}
    for one in _placed([file for file in found.files if file.suffix in IMAGE_SUFFIXES], uri):
        by_split.setdefault(one.split, []).append(one)
    train = by_split.get("train", [])
    if not train:
        return ClassFolders([], [], ())
    _check_one(train, uri)
    _check_files(train, found)
    names = tuple(sorted({one.name for one in train}, key=_composed))
    _check_names(names, train[0], found)
    notes = _order_notes(names)
    for split in ("test", "val"):
        given = by_split.get(split, [])
        if given:
            _check_one(given, uri)
            _check_one([*given, *train], uri, across=True)
            _check_files(given, found)
            labeled = _labeled(given, names, found)
            if labeled:
                notes += [instead_of_test("/".join(given[0].base))] if split == "val" else []
                return ClassFolders([(one.file.path, one.name) for one in train], labeled, names, tuple(notes))
            notes.append(f"{'/'.join(given[0].base)} has images without labels and is left out")
    return ClassFolders([(one.file.path, one.name) for one in train], [], names, tuple(notes))


def _placed(images: Sequence[Found], uri: str) -> list[_Placed]:
    at = {file.parts: _split_at(file.folders) for file in images}
    splits = any(index is not None for index in at.values())
    first, last = min(file.folders for file in images), max(file.folders for file in images)
    shared = next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    common = min(shared, *(len(file.folders) - 1 for file in images))
    placed = []
    for file in images:
        index = at[file.parts]
        if splits and index is None:
            raise ConfigError(f"{file.path} lies in no class of a split of data.uri {uri!r}: move it into one, or away")
        depth = common if index is None else index + 1
        if len(file.folders) <= depth or depth < 0:
            raise ConfigError(
                f"{file.path} lies in no class folder: data.uri {uri!r} needs train/CLASS/*.png (lists of labels such"
                " as labels.csv are not read)"
            )
        said = None if index is None else split_name(file.folders[index])
        split = "train" if said is None else said.split
        placed.append(_Placed(file, file.folders[:depth], split, file.folders[depth], file.folders[depth + 1 :]))
    if not splits and all(split_name(one.name) for one in placed):
        raise ConfigError(f"{placed[0].file.path} lies in no class folder: data.uri {uri!r} needs train/CLASS/*.png")
    for one in placed:
        named = None if splits else split_name(one.name)
        if named and named.plain and named.split != "train":  # a train may be a class
            raise ConfigError(
                f"{one.file.path} lies in a folder called as a split, {one.name!r}, beside class folders: give it class"
                " folders of its own, a class another name, or move it away"
            )
    return placed


def _split_at(folders: tuple[str, ...]) -> int | None:
    """Which of the folders is the split: one that holds folders, first of those that are called by a split alone."""
    said = [(i, found) for i, name in enumerate(folders[:-1]) if (found := split_name(name))]
    return next((i for i, found in said if found.plain), said[0][0] if said else None)


def _check_one(split: Sequence[_Placed], uri: str, across: bool = False) -> None:
    """One data set, one folder for each split, and classes that do not hold folders of classes."""
    bases = sorted({one.base[:-1] if across else one.base for one in split})
    if len(bases) > 1:
        some = ", ".join(repr("/".join(base) or ".") for base in bases[:3])
        raise ConfigError(f"data.uri {uri!r} holds several folders of one split ({some}): give one, or move it away")
    for one in split:
        if len(one.inner) > 1 or (one.inner and one.inner[0].lower() not in PLAIN_FOLDERS):
            raise ConfigError(
                f"{one.file.path}: the class folder {one.name!r} holds the folder {one.inner[0]!r}, and either could be"
                " the class; bring the images of a class into one folder, beside those of the others"
            )


def _check_files(split: Sequence[_Placed], found: Listing) -> None:
    classes = {(*one.base, one.name) for one in split}
    for file in found.files:
        inside = file.folders[: len(split[0].base) + 1] in classes
        if inside and file.suffix not in IMAGE_SUFFIXES | SIDE_SUFFIXES:
            raise ConfigError(f"{file.path} is no image that is read ({_READ}): convert it, or move it away")
    masks = [(one.file, masked) for one in split if (masked := _MASK.search(one.file.path.stem))]
    images = {(one.file.folders, one.file.path.stem) for one in split} if masks else set()
    for file, masked in masks:
        image = masked.string[: masked.start()]
        if (file.folders, image) in images:
            raise ConfigError(
                f"{file.path} may be the mask of {image!r} beside it, and would be an image of its class: move masks"
                " away, or rename it"
            )


def _composed(name: str) -> str:
    """The form of a name in which é is one character, wherever it was written: systems differ in it."""
    return unicodedata.normalize("NFC", name)


def _order_notes(names: tuple[str, ...]) -> list[str]:
    """A line where numbers in the names of classes are not in their order."""
    by_number = sorted(names, key=lambda name: re.sub("[0-9]+", lambda number: number[0].zfill(32), _composed(name)))
    for label, (name, other) in enumerate(zip(names, by_number, strict=True)):
        if name != other:
            taken, missed = one_line([name]), one_line([other])
            return [f"class {label} is {taken}, not {missed}: folders go in the order of texts, as torchvision's do"]
    return []


def _check_names(names: tuple[str, ...], one: _Placed, found: Listing) -> None:
    folder = "/".join(one.base) or "data.uri"
    if len(names) < 2:
        raise ConfigError(f"{folder} has one class folder alone, {names[0]!r}: {one.file.path}")
    beside = {path[-1] for path in found.folders if path[:-1] == one.base}
    if empty := sorted(beside - set(names)):
        raise ConfigError(
            f"the class folder {empty[0]!r} of {folder} holds no image ({_READ}); fill it or move it away"
        )
    same: dict[str, str] = {}
    for name in names:
        if re.search(r"[\ud800-\udfff]", name):
            raise ConfigError(f"the name of the class folder {name!r} of {folder} is no UTF-8: rename it")
        plain = _composed(name).strip().casefold()
        if plain in same:
            raise ConfigError(
                f"the class folders {same[plain]!r} and {name!r} of {folder} may be one class; rename one"
            )
        same[plain] = name


def _labeled(split: list[_Placed], names: tuple[str, ...], found: Listing) -> list[tuple[Path, str]]:
    """Images and classes of a test split; none where it has no labels."""
    if {one.name for one in split} <= {name for name in PLAIN_FOLDERS if name not in names}:
        base = split[0].base
        lists = [f for f in found.files if f.folders == base and f.parts[-1].endswith("annotations.txt")]
        if not lists:
            return []
        named = _listed(lists[0].path)
        if unlisted := [one.file.path for one in split if one.file.path.name not in named]:
            raise ConfigError(f"{lists[0].path} has no line for {unlisted[0].name}")
        labeled = [(one.file.path, named[one.file.path.name]) for one in split]
    else:
        labeled = [(one.file.path, one.name) for one in split]
    known = {_composed(name): name for name in names}
    labeled = [(path, known.get(_composed(name), name)) for path, name in labeled]
    if unknown := sorted({name for _, name in labeled} - set(names)):
        raise ConfigError(f"the test split has classes that the training split has not: {one_line(unknown[:5])}")
    return labeled


def _listed(file: Path) -> dict[str, str]:
    """Lines of an image's name, a tab and its class: what follows is not read."""
    try:
        rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {first_line(error)}") from error
    return {row[0]: row[1] for row in rows if len(row) > 1}
