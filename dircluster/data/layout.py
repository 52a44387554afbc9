"""Which files under ``data.uri`` are the training and the test split, and how many images they hold, unread.

It knows no torch: what it can refuse is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dircluster.config import ConfigError, DataConfig, StorageConfig, as_path, first_line, local_path
from dircluster.data import parquet
from dircluster.data.class_folders import ClassFolders, class_folders
from dircluster.data.files import IMAGE_SUFFIXES, PARQUET_SUFFIXES, Found, listing
from dircluster.data.picture import Blob, check_shape, pixels
from dircluster.data.table_files import table_splits
from dircluster.data.unread import check_unread

KNOWN_SIZES = {
    "digits": (1797, 0),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
}
"""Training images of the named sets, before the held-out share is cut off, and test images: 0 where these are cut off
too."""
KNOWN_SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "svhn": (3, 32, 32)}
"""Channels, height and width of their images."""
MOST_HELD_OUT = 10_000
"""Held-out images of a stream at the most, but for the rest of a row group: they lie in memory."""
KNOWN_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "svhn": 10}


@dataclass(frozen=True)
class Layout:
    """Parquet files or images under ``data.uri``, of the training and of the test split."""

    train: list[Path]
    test: list[Path]
    root: Path | None = None
    """What ``data.uri`` names: folders below it may hold labels (label=3), those above do not."""
    folders: ClassFolders | None = None
    """Set for images in folders."""
    notes: tuple[str, ...] = ()


def layout_of(config: DataConfig, open_path: Callable[[str], Path]) -> Layout:
    """The files of both splits. Raises ConfigError where ``data.uri`` is missing, or it is not plain which they are."""
    path = open_path(config.uri or "")
    try:
        exists, single = path.exists(), path.is_file()
    except OSError as error:
        raise ConfigError(f"data.uri {str(path)!r} cannot be read: {first_line(error)}") from error
    if not exists:
        hint = "; python infra/photo_shards.py FOLDER writes small shards to try it with" if config.stream else ""
        raise ConfigError(f"data.uri {str(path)!r} does not exist{hint}")
    if single and path.suffix.lower() not in PARQUET_SUFFIXES:
        raise ConfigError(f"data.uri {str(path)!r} is neither a folder nor a parquet file (*.parquet)")
    found = None if single else listing(path)
    files = [Found((path.name,), path)] if found is None else found.files
    tables = [file for file in files if file.suffix in PARQUET_SUFFIXES]
    images = [file for file in files if file.suffix in IMAGE_SUFFIXES]
    left_out = found.notes if found else ()
    if found and "_delta_log" in found.left_out:
        _check_delta(path)
    if tables:
        labels = (*parquet.LABEL_COLUMNS, *filter(None, [config.label_column]))
        train, test, notes = table_splits(tables, str(path), labels)
        beside = [f"{len(images)} images beside the parquet files are not read"] if images else []
        made = Layout(train, test, path, None, (*notes, *beside, *left_out))
    elif images and found is not None:
        if config.label_column or config.image_column:
            raise ConfigError(f"data.uri {str(path)!r} holds images in folders, not columns: see data.label_column")
        folders = class_folders(found, str(path))
        train, test = [file for file, _ in folders.train], [file for file, _ in folders.test]
        made = Layout(train, test, path, folders, (*folders.notes, *left_out))
    else:
        beside = [f" (but {files[0].path.name})"] if files else [f"; {note}" for note in left_out]
        raise ConfigError(f"data.uri {str(path)!r} holds neither parquet files nor images{''.join(beside)}")
    check_unread(files, PARQUET_SUFFIXES if tables else IMAGE_SUFFIXES)
    if not made.train:
        raise ConfigError(f"data.uri {str(path)!r} has no training split: name its files or folders train*")
    return made


def _check_delta(path: Path) -> None:
    """Raise ConfigError where a Delta table below ``path`` has files that are of older versions alone."""
    for log in sorted(path.glob("**/_delta_log/*.json")):
        try:
            stale = '"remove":' in log.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{log} cannot be read: {first_line(error)}") from error
        if stale:
            raise ConfigError(
                f"{log}: the Delta table has removed files that still lie there and would be read; write the version"
                " that counts as parquet files of its own"
            )


def data_cache(storage: StorageConfig) -> Path:
    """Where downloads of datasets are kept: beside the checkpoints where that is a folder."""
    elsewhere = "://" in as_path(storage.uri)
    return Path.home() / ".cache" / "dircluster" if elsewhere else local_path(storage.uri) / "data"


def split_sizes(
    config: DataConfig, open_path: Callable[[str], Path] = local_path, layout: Layout | None = None
) -> tuple[int, int, int]:
    """How many images are trained on, held out and tested on, without reading them.

    ``layout`` is that of ``data.uri`` where it is known. Raises ConfigError where ``data.uri`` is unusable.
    """
    if config.uri is None:
        whole, test = KNOWN_SIZES[config.name]
    else:
        layout = layout or layout_of(config, open_path)
        count = len if layout.folders else _rows
        whole, test = count(layout.train), count(layout.test)
    if not test:
        test = max(1, round(config.test_share * whole))
        whole -= test
    if config.limit is not None:
        whole, test = min(whole, config.limit), min(test, config.limit)
    held_out = max(1, round(config.held_out * whole))
    if config.stream:  # which keeps whole row groups: so many, or some more
        held_out = min(held_out, MOST_HELD_OUT)
    elif held_out >= whole:
        raise ConfigError(f"data.held_out {config.held_out:g} leaves nothing of {whole} images to train on")
    return whole - held_out, held_out, test


def check(config: DataConfig, open_path: Callable[[str], Path] = local_path) -> tuple[int, int, int]:
    """The sizes of the splits. Raises ConfigError for what names, footers, labels and first images show to be wrong.

    No other image is read.
    """
    if config.uri is None:
        check_named(config)
        return split_sizes(config, open_path)
    layout = layout_of(config, open_path)
    if config.stream and (layout.folders or not layout.test):
        raise ConfigError(f"data.stream needs parquet shards train* and test* in data.uri {config.uri!r}")
    for blob in _first_images(layout, config):
        height, width, channels = pixels(blob, config).shape
        check_shape((channels, height, width), config)
    return split_sizes(config, open_path, layout)


def check_named(config: DataConfig) -> None:
    """Raise ConfigError where ``config`` says another size or number of classes than those of the set that it names."""
    check_shape(KNOWN_SHAPES[config.name], config)
    known = KNOWN_CLASSES[config.name]
    if config.classes != known:
        raise ConfigError(f"data.classes is {config.classes}, but {config.name} has {known} classes: set it")


def check_names(layout: Layout, config: DataConfig) -> None:
    """Raise ConfigError where there are more or fewer class folders than ``data.classes``: labels would be others'."""
    count = len(layout.folders.names) if layout.folders else config.classes
    if count != config.classes:
        noted = "".join(f"; {note}" for note in layout.notes)
        raise ConfigError(f"there are {count} class folders, but data.classes is {config.classes}{noted}")


def _first_images(layout: Layout, config: DataConfig) -> list[Blob]:
    """The first image of each split, once names and labels are checked."""
    if layout.folders:
        check_names(layout, config)
        return [*layout.train[:1], *layout.test[:1]]
    train = parquet.choose_all(layout.train, config, layout.root)
    test = parquet.choose_all(layout.test, config, layout.root) if layout.test else {}
    parquet.same_columns(train | test, config)
    for file, columns in (train | test).items():
        if not config.stream:  # whose labels are many
            parquet.check_labels(parquet.labels_of(file, columns), config, file)
    return [parquet.first_image(*next(iter(chosen.items()))) for chosen in (train, test) if chosen]


def _rows(files: list[Path]) -> int:
    """Rows of parquet files."""
    rows = 0
    for file in files:
        with parquet.opened(file) as table:
            rows += table.metadata.num_rows
    return rows
