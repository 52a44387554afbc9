"""Columns of parquet files that say which split a row belongs to: such a file holds rows that are not to be mixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dircluster.config import ConfigError
from dircluster.data.files import one_line
from dircluster.data.split_names import split_name, words

MOST_VALUES = 16
"""A column with more different values says no split: captions and names of files have many."""
_TRUTH = {"0", "1", "false", "true", "no", "yes"}


class SplitColumns:
    """What is seen in the columns of a split's files, one file after the other, beside images and labels."""

    def __init__(self) -> None:
        self._values: dict[str, set[str]] = {}
        """By column; more than MOST_VALUES where they say no split."""

    def check(self, table: Any, file: Path, read: tuple[str, str]) -> None:
        """Raise ConfigError where a column of pyarrow's ParquetFile, with those before it, says two splits.

        Texts under any name say them by their values, integers and truth values by the name of the column. Columns
        ``read`` hold images and labels.
        """
        for field in table.schema_arrow:
            seen = self._values.setdefault(field.name, set())
            if field.name in read or not _may_say(field) or len(seen) > MOST_VALUES:
                continue
            for batch in table.iter_batches(columns=[field.name]):
                seen |= {str(value) for value in set(batch.column(0).to_pylist()) if value is not None}
                if len(seen) > MOST_VALUES:
                    break
            else:
                if _several(field.name, seen):
                    some = one_line(sorted(seen)[:4])
                    raise ConfigError(
                        f"{file}: its column {field.name!r} says the splits of rows ({some}), which would be mixed:"
                        " write a file of each split (train.parquet, test.parquet), or leave the column out"
                    )


def _may_say(field: Any) -> bool:
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    numbers = (pa.types.is_integer, pa.types.is_boolean)
    named = "split" in words(field.name) or _said(field.name) is not None
    return any(is_kind(kind) for is_kind in texts) or (named and any(is_kind(kind) for is_kind in numbers))


def _several(name: str, values: set[str]) -> bool:
    """Whether values of a column are of two splits: by what they say, as numbers of a split, or as is_test says it."""
    if len({split for value in values if (split := _said(value))}) > 1:
        return True
    if "split" in words(name):
        return len(values) > 1
    truth = {value.lower() for value in values}
    return _said(name) is not None and len(truth) > 1 and truth <= _TRUTH


def _said(name: str) -> str | None:
    """The split that a name or a value says; a value that says two, as a sentence may, says none."""
    try:
        found = split_name(name)
    except ConfigError:
        return None
    return found.split if found else None
