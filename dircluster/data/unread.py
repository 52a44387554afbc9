"""Files that say a split by their names and are not read: nothing else may stand for that split in silence."""

from __future__ import annotations

from collections.abc import Sequence

from dircluster.config import ConfigError
from dircluster.data.files import IMAGE_SUFFIXES, SIDE_SUFFIXES, Found
from dircluster.data.split_names import SplitName, one_split, split_name, words

_NO_DATA = {".md", ".rst", ".html", ".pdf", ".log", ".py", ".ipynb", ".sh", ".yaml", ".yml", ".toml", ".ini", ".cfg"}
"""What holds no images and no list of them, whatever its name."""
_LISTS = {"list", "lists", "file", "files", "filename", "filenames", "name", "names", "id", "ids", "idx", "index"} | {
    *("label", "labels", "annotation", "annotations", "split", "splits", "image"),
}
"""What the name of a list may say beside the split that it is of."""


def check_unread(files: Sequence[Found], read: set[str]) -> None:
    """Raise ConfigError where a split is named only by files whose suffix is none of ``read``.

    A list (test.csv, test_labels.csv) says one where its name says nothing else, and a test split where it says splits
    (train_test_split.txt); what lies in a folder has the folder's split too. val may lie unread beside test.
    """
    known = {found.split for file in files if file.suffix in read for found in _splits_of(file)}
    unread = [file for file in files if file.suffix not in read | _NO_DATA]
    for split, others in (("train", set[str]()), ("test", set[str]()), ("val", {"test"})):
        if known & {split, *others}:
            continue
        for file in unread:
            if any(found.split == split for found in _splits_of(file)):
                raise ConfigError(
                    f"{file.path} says by its name that it is of the split {split}, and is not read: bring it into the"
                    " form of the rest, or move it away"
                )


def _splits_of(file: Found) -> list[SplitName]:
    """The splits that a file's folders say, and its own name unless it is an image's; what says two says none."""
    found = [one_split(folder) for folder in file.folders]
    if file.suffix in SIDE_SUFFIXES:
        found.append(_of_list(file.path.stem))
    elif file.suffix not in IMAGE_SUFFIXES:
        found.append(one_split(file.path.stem))
    return [split for split in found if split and (split.plain or file.suffix not in SIDE_SUFFIXES)]


def _of_list(name: str) -> SplitName | None:
    """The split that a list is of: test where its name says two, or splits."""
    bare = "_".join(word for word in words(name) if word not in _LISTS)
    try:
        found = split_name(bare)
    except ConfigError:
        return SplitName("test", True)
    return found or (SplitName("test", True) if {"split", "splits"} & {*words(name)} else None)
