"""Images and labels of parquet files: which columns hold them, and what their values mean.

pyarrow is imported where it is used: a run on digits works without it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dircluster.config import ConfigError, DataConfig, first_line
from dircluster.data.files import one_line
from dircluster.data.picture import Cell
from dircluster.data.split_columns import SplitColumns

LABEL_COLUMNS = (
    *("label", "labels", "fine_label", "target", "class", "targets", "cls", "class_id", "class_idx", "class_label"),
    *("label_id", "category", "category_id", "y", "coarse_label"),
)
IMAGE_COLUMNS = (
    *("image", "img", "images", "picture", "photo", "pixels", "image_bytes", "img_bytes", "png", "jpg", "jpeg", "webp"),
    *("bytes", "content", "data", "x"),
)
"""Names of columns, in the order in which they are taken; in other letters too (Label)."""


@dataclass(frozen=True)
class Columns:
    """The columns of a parquet file that are read. ``label_value`` is the label that a folder says (label=3)."""

    image: str
    label: str
    classes: tuple[str, ...] = ()
    """Names of the classes that the file's metadata holds (ClassLabel of Hugging Face), by label."""
    label_value: str | None = None
    has_labels: bool = True
    """Whether the file has the label column too; then both must say the same."""
    class_count: int | None = None
    """How many classes the metadata says."""
    notes: tuple[str, ...] = ()

    @property
    def stored(self) -> list[str]:
        return [self.image, self.label] if self.has_labels else [self.image]


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """``file`` as pyarrow's ParquetFile, whose pages are checked where they have checksums.

    Raises ConfigError where it is damaged, or is read within the block and found so.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open("rb") as stream:
            yield pq.ParquetFile(stream, page_checksum_verification=True)
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, TypeError, MemoryError) as error:
        raise ConfigError(f"{file} cannot be read as parquet: {first_line(error)}") from error


def contents(table: Any, chosen: Columns, source: Path, first: int = 0) -> tuple[list[Cell], list[int]]:
    """Encoded images and labels of a parquet table by its chosen columns; its first row is row ``first`` of ``source``.

    Raises ConfigError where a label is none.
    """
    found = labels(table, chosen, source)
    return _cells(table, chosen, source, first), found


def labels_of(file: Path, chosen: Columns) -> list[int]:
    """All labels of a file; of its images nothing is read. Raises ConfigError."""
    with opened(file) as table:
        return labels(table.read(columns=chosen.stored[1:]), chosen, file)


def first_image(file: Path, chosen: Columns) -> Cell:
    """The image in the first row of a file that has rows. Raises ConfigError."""
    import pyarrow as pa

    with opened(file) as table:
        batch = next(table.iter_batches(batch_size=1, columns=[chosen.image]))
        return _cells(pa.Table.from_batches([batch]), chosen, file, 0)[0]


def choose_all(files: Sequence[Path], config: DataConfig, root: Path | None = None) -> dict[Path, Columns]:
    """The columns of all files of a split that have rows; folders below ``root`` may hold labels.

    Raises ConfigError where all are empty, one has no images or labels, two differ in what they hold, or a column says
    that rows are of several splits.
    """
    chosen: dict[Path, Columns] = {}
    splits = SplitColumns()
    for file in files:
        with opened(file) as table:
            if table.metadata.num_rows:
                chosen[file] = choose(table.schema_arrow, file, config, root)
                splits.check(table, file, (chosen[file].image, chosen[file].label))
    if not chosen:
        raise ConfigError(f"{files[0]} holds no rows")
    same_columns(chosen, config)
    return chosen


def choose(schema: Any, source: Path, config: DataConfig | None = None, root: Path | None = None) -> Columns:
    """The columns of ``source``, or folders between it and ``root``, that hold images and labels.

    Raises ConfigError where that is not plain.
    """
    wanted_image, wanted_label = (config.image_column, config.label_column) if config else (None, None)
    names = list(schema.names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{source} has two columns called {twice[0]!r}")
    folders = source.relative_to(root).parts[:-1] if root else ()
    said = [re.fullmatch(r"(\w+)=(.*)", folder) for folder in folders]
    values = {match[1]: match[2] for match in said if match}
    features = _features(schema)
    label, notes = _label_column({**dict.fromkeys(names), **dict.fromkeys(values)}, features, source, wanted_label)
    image, more = _image_column(schema, label, source, wanted_image)
    classes, count = features.get(label, ((), None))
    return Columns(
        image,
        label,
        classes,
        values.get(label),
        has_labels=label in names,
        class_count=count,
        notes=(*notes, *more),
    )


def _label_column(
    names: Mapping[str, Any], features: Mapping[str, Any], source: Path, wanted: str | None
) -> tuple[str, tuple[str, ...]]:
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(f"data.label_column {wanted!r} is no column of {source}; columns: {list(names)}")
        return wanted, ()
    found = _by_name(names, LABEL_COLUMNS)
    found += [name for name in features if name in names and name not in found]
    if not found:
        raise ConfigError(
            f"{source} has no integer column {' or '.join(LABEL_COLUMNS[:5])}; columns: {list(names)}; say which"
            " holds the labels: --data.label-column NAME"
        )
    return found[0], _several("labels", found, "--data.label-column")


def _image_column(schema: Any, label: str, source: Path, wanted: str | None) -> tuple[str, tuple[str, ...]]:
    if wanted is not None:
        if wanted not in schema.names:
            raise ConfigError(f"data.image_column {wanted!r} is no column of {source}; columns: {schema.names}")
        if not _is_bytes(schema.field(wanted).type):
            raise ConfigError(
                f"data.image_column {wanted!r} of {source} holds {schema.field(wanted).type}, {_NO_IMAGES}"
            )
        return wanted, ()
    fit = [name for name in schema.names if name != label and _is_bytes(schema.field(name).type)]
    found = _by_name(fit, IMAGE_COLUMNS)
    if not fit:
        raise ConfigError(
            f"{source} has no column of image bytes; columns: {[f'{f.name} ({f.type})' for f in schema]}; {_NO_IMAGES}"
        )
    if not found and len(fit) > 1:
        raise ConfigError(
            f"{source} has {len(fit)} columns of bytes, {', '.join(fit)}: say which, --data.image-column NAME"
        )
    named = _by_name(schema.names, IMAGE_COLUMNS[:5])
    if named and not found and named[0] != label:
        raise ConfigError(
            f"the column {named[0]!r} of {source} holds {schema.field(named[0]).type}, {_NO_IMAGES}; to take"
            f" {fit[0]!r} instead: --data.image-column {fit[0]}"
        )
    taken = (found or fit)[0]
    return taken, _several("images", [taken, *(name for name in fit if name != taken)], "--data.image-column")


_NO_IMAGES = "no encoded images: write PNG or JPEG bytes, not pixels or paths (docs/extend.md shows how)"


def _by_name(names: Collection[str], known: Sequence[str]) -> list[str]:
    """Those of ``names`` that are known: first as they are written, then in other letters."""
    exact = [name for name in known if name in names]
    other = [name for one in known for name in sorted(names) if name.lower() == one and name not in exact]
    return exact + other


def _several(what: str, found: Sequence[str], flag: str) -> tuple[str, ...]:
    if len(found) < 2:
        return ()
    return (f"{what} are taken from column {found[0]!r}, not from {', '.join(map(repr, found[1:]))} ({flag})",)


def _features(schema: Any) -> dict[str, tuple[tuple[str, ...], int]]:
    """Names and number of classes by column, from the metadata that Hugging Face's datasets writes, if it is JSON."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {name: kind for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
        names = {name: _class_names(kind.get("names") or ()) for name, kind in kinds.items()}
        counts = {name: len(names[name]) or int(kind.get("num_classes") or 0) for name, kind in kinds.items()}
        return {name: (names[name], count) for name, count in counts.items() if count}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _class_names(given: Any) -> tuple[str, ...]:
    """Names by label, of a list or, as dataset cards have them, of a map ({"0": "cat"}). Raises LookupError."""
    listed = [given[str(label)] for label in range(len(given))] if isinstance(given, Mapping) else given
    return tuple(map(str, listed))


def _is_bytes(kind: Any) -> bool:
    """Whether a column of a type may hold encoded images: bytes, or a struct with a field ``bytes`` of them."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _is_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_bytes(kind.field(index).type)
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in kinds)


def _cells(table: Any, chosen: Columns, source: Path, first: int) -> list[Cell]:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(chosen.image)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return [Cell(content, source, first + row) for row, content in enumerate(column.to_pylist())]


def labels(table: Any, chosen: Columns, source: Path) -> list[int]:
    """Labels of a table: integers, or what is one without a doubt. Raises ConfigError."""
    import pyarrow as pa

    if chosen.label_value is not None and not re.fullmatch(r"-?\d+", chosen.label_value):
        folder = one_line([f"{chosen.label}={chosen.label_value}"])
        raise ConfigError(f"{source}: the folder {folder} says no integer; {_INTEGERS}")
    said = None if chosen.label_value is None else int(chosen.label_value)
    if said is not None and not chosen.has_labels:
        return [said] * table.num_rows
    column, name = table.column(chosen.label), chosen.label
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    numbers = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_decimal)
    if not any(is_kind(kind) for is_kind in numbers):
        raise ConfigError(
            f"{source} has no integer column of labels: {name!r} holds {kind}; {_INTEGERS}, or name the column that"
            " holds them: --data.label-column NAME"
        )
    values = column.to_pylist()
    missing = [row for row, value in enumerate(values) if value is None or value != value]
    if missing:
        raise ConfigError(
            f"{source} has {len(missing)} rows without a label in {name!r}, the first is row {missing[0]}"
        )
    broken = next((row for row, value in enumerate(values) if not math.isfinite(value) or int(value) != value), None)
    if broken is not None:
        raise ConfigError(f"{source}, row {broken}: the label {values[broken]} is no whole number; {_INTEGERS}")
    found = [int(value) for value in values]
    other = next((row for row, label in enumerate(found) if said is not None and label != said), None)
    if other is not None:
        raise ConfigError(
            f"{source}, row {other}: the column {name!r} says {found[other]}, but the folder {name}={said}; rename the"
            " folder, or name another column: --data.label-column NAME"
        )
    return found


_INTEGERS = "write integers from 0 to data.classes - 1"


def check_labels(found: Sequence[int], config: DataConfig, source: Path | None = None) -> None:
    """Raise ConfigError, naming the first row, where a label is not in [0, data.classes)."""
    low, high = min(found, default=0), max(found, default=0)
    if low >= 0 and high < config.classes:
        return
    row = next(i for i, label in enumerate(found) if not 0 <= label < config.classes)
    hint = ""
    if low < 0:
        below = sum(label < 0 for label in found)
        hint = f"; {below} rows below 0 (often: unlabeled) must go, or the file must be called extra-*"
    elif high == config.classes and low > 0:
        hint = "; labels count from 0: subtract 1"
    where = f" ({source}, row {row}, has {found[row]})" if source else ""
    raise ConfigError(f"labels reach from {low} to {high}, but data.classes is {config.classes}{where}{hint}")


def same_columns(chosen: Mapping[Path, Columns], config: DataConfig) -> Columns:
    """What all files have in common. Raises ConfigError where two differ, or have other names than data.classes."""
    first, one = next(iter(chosen.items()))
    for file, other in chosen.items():
        for what in ("label", "image"):
            if getattr(other, what) != getattr(one, what):
                raise ConfigError(
                    f"{first} has its {what}s in column {getattr(one, what)!r}, {file} in {getattr(other, what)!r};"
                    f" name a column that all have: --data.{what}-column NAME"
                )
        if other.classes and one.classes and other.classes != one.classes:
            raise ConfigError(f"{first} and {file} name the classes of {one.label!r} differently")
        if other.class_count is not None and other.class_count != config.classes:
            some = f" ({one_line(other.classes[:3])}, ...)" if other.classes else ""
            raise ConfigError(
                f"{file}: the column {other.label!r} has {other.class_count} classes{some}, but data.classes is"
                f" {config.classes}; set it, or name another column: --data.label-column NAME"
            )
    return next((other for other in chosen.values() if other.classes), one)
