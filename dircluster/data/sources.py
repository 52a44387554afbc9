"""Real images into memory: scikit-learn's digits, torchvision's CIFAR and SVHN, labeled parquet, image folders."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import ConfigError, DataConfig, first_line, local_path
from dircluster.data import parquet
from dircluster.data.class_folders import ClassFolders
from dircluster.data.decode import decode
from dircluster.data.files import one_line
from dircluster.data.layout import MOST_HELD_OUT, check_named, check_names, layout_of
from dircluster.data.picture import Blob, loses_color
from dircluster.data.split import Dataset, Split
from dircluster.files import locked


@dataclass(frozen=True)
class Encoded:
    """Images as they are stored, and their labels (n,): what a run does not use is not decoded."""

    images: Sequence[Blob]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor | slice) -> Encoded:
        """Some of the rows, in the order given."""
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return Encoded([self.images[row] for row in chosen], self.labels[rows])

    def decoded(self, config: DataConfig) -> Split:
        """The images in memory. Raises ConfigError as :func:`decode` does."""
        return Split(decode(self.images, config), self.labels)


Stored = Split | Encoded


@dataclass(frozen=True)
class Source:
    """Both splits as they are stored, None where there is no test split; class names and notes as Dataset has them."""

    train: Stored
    test: Stored | None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    config: DataConfig,
    seed: int,
    cache: Path = Path("runs/data"),
    open_path: Callable[[str], Path] = local_path,
) -> Dataset:
    """Read and check ``config``'s data; ``seed`` decides which training images are held out.

    ``cache`` keeps downloads, and ``open_path`` opens ``data.uri``.

    Raises ConfigError when data is missing, empty, unlabeled, of mixed size, or not what ``config`` says it is.
    """
    if config.stream:
        return _streamed(config, seed, open_path)
    if config.uri is None:
        check_named(config)
        source = Source(*DATASETS[config.name](cache))
    else:
        source = _from_path(config, open_path)
    first, second = source.train, source.test
    _check_labels(first, config)
    cut_off: tuple[str, ...] = ()
    if second is None:
        first = _in_memory(first, config) if config.limit is None else first  # all is used: sizes are compared
        order = torch.randperm(len(first), generator=rng.generator(0, "test_split"))
        cut = max(1, round(config.test_share * len(first)))
        if config.uri is not None:  # a named set's test split is known
            cut_off = (f"no test split is there: {cut} of the {len(first)} images are (data.test_share)",)
        first, second = first.take(order[cut:]), first.take(order[:cut])
    _check_labels(second, config)
    training, test = _in_memory(first, config), _in_memory(second, config)
    grayed = _gray_notes(first.images[:1], config) if isinstance(first, Encoded) else []
    order = torch.randperm(len(training), generator=rng.generator(seed, "held_out"))
    cut = max(1, round(config.held_out * len(training)))
    if cut >= len(training):
        raise ConfigError(f"data.held_out {config.held_out:g} leaves nothing of {len(training)} images to train on")
    digest = hashlib.sha256()
    for part in (training, test):
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    labels = {"training": training.labels, "test": test.labels}
    notes = (*source.notes, *_class_notes(labels, source.classes, config), *grayed, *cut_off)
    notes += tuple(_twin_notes(training.images, test.images))
    train, held_out = training.take(order[cut:]), training.take(order[:cut])
    return Dataset(train, held_out, test, digest.hexdigest(), source.classes, notes)


def _streamed(config: DataConfig, seed: int, open_path: Callable[[str], Path]) -> Dataset:
    """Training shards that stay where they are; held-out row groups and the test split in memory."""
    from dircluster.data.stream import open_shards, read_group

    layout = layout_of(config, open_path)
    if layout.folders or not layout.test:
        raise ConfigError(f"data.stream needs parquet shards train* and test* in data.uri {config.uri!r}")
    shards = open_shards(layout.train, config, layout.root)
    test = parquet.choose_all(layout.test, config, layout.root)
    parquet.same_columns({group.shard: group.columns for group in shards.groups} | test, config)
    rest, off = shards.split_off(config.held_out, MOST_HELD_OUT, seed)
    read = [read_group(group) for group in off.groups]
    blobs, labels = [b for part in read for b in part[0]], [i for part in read for i in part[1]]
    held_out = Split(decode(blobs, config), torch.tensor(labels, dtype=torch.int64))
    judged = _read_tables(test, config).decoded(config)
    digest = hashlib.sha256(shards.fingerprint().encode())
    digest.update(judged.images.numpy().tobytes())
    digest.update(judged.labels.numpy().tobytes())
    notes = (
        *layout.notes,
        *shards.columns.notes,
        *_class_notes({"test": judged.labels}, shards.columns.classes, config),
        *_gray_notes(blobs[:1], config),
    )
    return Dataset(rest, held_out, judged, digest.hexdigest(), shards.columns.classes, notes)


def _in_memory(stored: Stored, config: DataConfig) -> Split:
    """The images that ``data.limit`` leaves of a split, decoded. Raises ConfigError."""
    some = stored if config.limit is None else stored.take(slice(config.limit))
    return some.decoded(config) if isinstance(some, Encoded) else some


def _check_labels(split: Stored, config: DataConfig) -> None:
    parquet.check_labels(split.labels.tolist(), config)


def _class_notes(labels: Mapping[str, Tensor], names: tuple[str, ...], config: DataConfig) -> list[str]:
    """What a reader of the log should see: how classes are called, and which of them a split, by its name, has not."""
    notes = []
    if names:
        notes.append(f"classes 0 to {len(names) - 1} are {one_line(names[:10])}{', ...' * (len(names) > 10)}")
    limited = "" if config.limit is None else f" (data.limit takes the first {config.limit})"
    for split, of in labels.items():
        empty = (torch.bincount(of, minlength=config.classes) == 0).nonzero().flatten().tolist()
        if empty:
            some = ", ".join(map(str, empty[:5])) + ", ..." * (len(empty) > 5)
            notes.append(f"{len(empty)} of {config.classes} classes have no {split} image: {some}{limited}")
    return notes


def _gray_notes(first: Sequence[Blob], config: DataConfig) -> list[str]:
    """A line where colors of the first image are lost."""
    lost = any(loses_color(blob, config) for blob in first)
    return ["the first image has colors, and is read as gray: data.channels is 1"] if lost else []


def _twin_notes(training: Tensor, test: Tensor) -> list[str]:
    """A line where test images (n, C, H, W) are training images too. Those of other middle rows need no comparison."""
    middle = training.shape[2] // 2
    rows, others = ([row.tobytes() for row in images[:, :, middle].numpy()] for images in (training, test))
    shared = {*rows} & {*others}
    known = {image.tobytes() for image, row in zip(training.numpy(), rows, strict=True) if row in shared}
    twins = sum(row in shared and image.tobytes() in known for image, row in zip(test.numpy(), others, strict=True))
    return [f"{twins} of {len(test)} test images are training images too, pixel for pixel"] if twins else []


def _digits() -> Split:
    """What scikit-learn's ``load_digits`` gives, read from its wheel: importing the package takes a second.

    A row of the table is 64 pixels from 0 to 16 and the label.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ConfigError("data.name digits lies in scikit-learn, which is not installed")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)
    return Split(torch.from_numpy(pixels.reshape(-1, 1, 8, 8)), torch.from_numpy(table[:, -1]).long())


def _cifar(kind: str, cache: Path, train: bool, download: bool) -> Split:
    """torchvision's CIFAR10, or CIFAR100 with its fine labels."""
    import torchvision.datasets

    made: Any = getattr(torchvision.datasets, kind)(str(cache), train=train, download=download)
    images = torch.from_numpy(made.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(made.targets, dtype=torch.int64))


def _svhn(cache: Path, train: bool, download: bool) -> Split:
    import torchvision.datasets

    made: Any = torchvision.datasets.SVHN(str(cache), split="train" if train else "test", download=download)
    return Split(torch.from_numpy(made.data), torch.as_tensor(made.labels, dtype=torch.int64))


def _fetched(name: str, cache: Path, read: Callable[[Path, bool, bool], Split]) -> tuple[Split, Split]:
    """Training and test split of a set in ``cache``. One process downloads what is not whole there, others wait for it.

    ``read`` takes the folder, whether the split is that of training, and whether torchvision may download it. Raises
    ConfigError where the set cannot be fetched.
    """
    try:
        with contextlib.suppress(RuntimeError):  # torchvision's, of a set that is not there or not whole
            return read(cache, True, False), read(cache, False, False)
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{name}.lock"):
            return read(cache, True, True), read(cache, False, True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision could not fetch {name}: {first_line(error)}; give --data.uri PATH instead"
        ) from error


DATASETS: dict[str, Callable[[Path], tuple[Split, Split | None]]] = {
    "digits": lambda cache: (_digits(), None),
    "cifar10": lambda cache: _fetched("cifar10", cache, partial(_cifar, "CIFAR10")),
    "cifar100": lambda cache: _fetched("cifar100", cache, partial(_cifar, "CIFAR100")),
    "svhn": lambda cache: _fetched("svhn", cache, _svhn),
}
"""How a set is loaded by its name: the folder of downloads -> training and test split, None where it has none."""


def _from_path(config: DataConfig, open_path: Callable[[str], Path]) -> Source:
    layout = layout_of(config, open_path)
    if layout.folders:
        check_names(layout, config)
        return _read_folders(layout.folders, layout.notes)
    train = parquet.choose_all(layout.train, config, layout.root)
    test = parquet.choose_all(layout.test, config, layout.root) if layout.test else {}
    chosen = parquet.same_columns(train | test, config)
    first, second = _read_tables(train, config), _read_tables(test, config) if test else None
    return Source(first, second, chosen.classes, (*layout.notes, *chosen.notes))


def _read_tables(chosen: Mapping[Path, parquet.Columns], config: DataConfig) -> Encoded:
    cells: list[Blob] = []
    labels: list[int] = []
    for file, columns in chosen.items():
        with parquet.opened(file) as table:
            some, found = parquet.contents(table.read(columns=columns.stored), columns, file)
        parquet.check_labels(found, config, file)
        cells += some
        labels += found
    return Encoded(cells, torch.tensor(labels, dtype=torch.int64))


def _read_folders(folders: ClassFolders, notes: tuple[str, ...]) -> Source:
    names = folders.names
    label = {name: number for number, name in enumerate(names)}
    splits = [
        Encoded([file for file, _ in split], torch.tensor([label[name] for _, name in split], dtype=torch.int64))
        for split in (folders.train, folders.test)
    ]
    return Source(splits[0], splits[1] if len(splits[1]) else None, names, notes)
