"""Columns of parquet files that say which split a row belongs to: such a file holds rows that are not to be mixed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dircluster.config import ConfigError
from dircluster.data.files import one_line
from dircluster.data.split_names import one_split, words

MOST_VALUES = 16
"""A column with more different values says no split: captions and names of files have many."""
_OF_LISTS = {"list", "element", "item", "array", "bag"}
"""What parquet's writers call the insides of a list."""
_TRUTH = {"0", "1", "false", "true", "no", "yes"}


class SplitColumns:
    """What is seen in the columns of a split's files, one file after the other, beside images and labels."""

    def __init__(self) -> None:
        self._values: dict[str, set[str]] = {}
        """By column; more than MOST_VALUES where they say no split."""

    def check(self, table: Any, file: Path, read: tuple[str, str]) -> None:
        """Raise ConfigError where a column of pyarrow's ParquetFile, with those before it, says two splits.

        Texts under any name say them by their values, paths by the folders in them; numbers, truth values and bytes by
        the name of the column. A field of a struct (meta.split) and an item of a list say what a column does; of a
        struct the name says nothing (eval.correct), unless it is one of splits. Columns ``read`` hold images and
        labels: of these, paths are looked at alone.
        """
        for column in map(table.schema.column, range(len(table.schema))):
            name = column.path
            seen = self._values.setdefault(name, set())
            if not _may_say(column, name.partition(".")[0] in read) or len(seen) > MOST_VALUES:
                continue
            for batch in table.iter_batches(columns=[name]):
                seen |= set(_values(batch.column(0).to_pylist()))
                if len(seen) > MOST_VALUES:
                    break
            else:
                if _several(name, seen):
                    some = one_line(sorted(seen)[:4])
                    raise ConfigError(
                        f"{file}: its column {name!r} says the splits of rows ({some}), which would be mixed: write a"
                        " file of each split (train.parquet, test.parquet), or leave the column out"
                    )


def _may_say(column: Any, is_read: bool) -> bool:
    """Whether values of a leaf of a parquet schema may say a split."""
    kind = column.logical_type.type
    if kind in ("STRING", "ENUM"):
        return True
    named = "split" in words(column.path) or _said(_own_name(column.path)) is not None
    return named and not is_read and kind in ("NONE", "INT")  # no dates and times


def _values(found: Any) -> Iterator[str]:
    """The values in what pyarrow gives, as texts: of a path the folders that say a split, and of nothing none."""
    if isinstance(found, dict | list):
        for inner in found.values() if isinstance(found, dict) else found:
            yield from _values(inner)
    elif isinstance(found, str | bytes):
        *folders, text = re.split(r"[/\\]", found if isinstance(found, str) else found.decode("latin-1"))
        splits = [folder for folder in folders if _said(folder)]
        if splits or not folders:
            yield "/".join(splits) or text
    elif found is not None:
        yield f"{found:g}" if isinstance(found, float) else str(found)


def _several(name: str, values: set[str]) -> bool:
    """Whether values of a column are of two splits: by what they say, as numbers of a split, or as is_test says it."""
    if len({split for value in values if (split := _said(value))}) > 1:
        return True
    if "split" in words(name):
        return len(values) > 1
    truth = {value.lower() for value in values}
    return _said(_own_name(name)) is not None and len(truth) > 1 and truth <= _TRUTH


def _own_name(path: str) -> str:
    """The name of a column, or of a field without the structs and lists that it lies in."""
    return next((part for part in reversed(path.split(".")) if part not in _OF_LISTS), path)


def _said(name: str) -> str | None:
    """The split that a name or a value says."""
    found = one_split(name)
    return found.split if found else None
