"""Real images into memory: scikit-learn's digits, torchvision's CIFAR and SVHN, labeled parquet, image folders."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import ConfigError, DataConfig, first_line, local_path
from dircluster.data.decode import columns, decode
from dircluster.data.split import Dataset, Split

MOST_HELD_OUT = 10_000
"""Held-out images of a stream at the most: they lie in memory."""
KNOWN_SIZES = {
    "digits": (1438, 359),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
}
"""Training images of the named sets, before the held-out share is cut off, and test images."""
SPLIT_NAME = re.compile(r"(train|test|val|extra)(?:id(?:ation)?)?(?![a-z])")
"""How files and folders of a split begin. Without a test split, val is it; extra is left out."""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class Encoded:
    """Images as they are stored, and their labels (n,): what a run does not use is not decoded."""

    images: Sequence[bytes | Path]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor | slice) -> Encoded:
        """Some of the rows, in the order given."""
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return Encoded([self.images[row] for row in chosen], self.labels[rows])

    def decoded(self, config: DataConfig) -> Split:
        """The images in memory. Raises ConfigError where one cannot be read or sizes differ."""
        return Split(decode(self.images, config), self.labels)


Stored = Split | Encoded


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
    stored: tuple[Stored, Stored | None] = (
        DATASETS[config.name](cache) if config.uri is None else _from_path(config, open_path)
    )
    first, second = stored
    _check_labels(first, config)
    if second is None:
        first = _in_memory(first, config) if config.limit is None else first  # all is used: sizes are compared
        order = torch.randperm(len(first), generator=rng.generator(0, "test_split"))
        cut = max(1, round(config.test_share * len(first)))
        first, second = first.take(order[cut:]), first.take(order[:cut])
    _check_labels(second, config)
    training, test = _in_memory(first, config), _in_memory(second, config)
    order = torch.randperm(len(training), generator=rng.generator(seed, "held_out"))
    cut = max(1, round(config.held_out * len(training)))
    if cut >= len(training):
        raise ConfigError(f"data.held_out {config.held_out:g} leaves nothing of {len(training)} images to train on")
    digest = hashlib.sha256()
    for part in (training, test):
        digest.update(part.images.numpy().tobytes())
        digest.update(part.labels.numpy().tobytes())
    return Dataset(training.take(order[cut:]), training.take(order[:cut]), test, digest.hexdigest())


def _streamed(config: DataConfig, seed: int, open_path: Callable[[str], Path]) -> Dataset:
    """Training shards that stay where they are; held-out row groups and the test split in memory."""
    from dircluster.data.stream import open_shards, read_group

    train, test = _files(config, open_path)
    if train[0].suffix != ".parquet" or not test:
        raise ConfigError(f"data.stream needs parquet shards train* and test* in data.uri {config.uri!r}")
    shards = open_shards(train, config)
    rest, off = shards.split_off(config.held_out, MOST_HELD_OUT, seed)
    read = [read_group(group) for group in off.groups]
    blobs, labels = [b for part in read for b in part[0]], [i for part in read for i in part[1]]
    held_out = Split(decode(blobs, config), torch.tensor(labels, dtype=torch.int64))
    judged = _parquet(test).decoded(config)
    for split in (held_out, judged):
        _check_size(split, config)
        _check_labels(split, config)
    digest = hashlib.sha256(shards.fingerprint().encode())
    digest.update(judged.images.numpy().tobytes())
    return Dataset(rest, held_out, judged, digest.hexdigest())


def _in_memory(stored: Stored, config: DataConfig) -> Split:
    """The images that ``data.limit`` leaves of a split, decoded. Raises ConfigError."""
    some = stored if config.limit is None else stored.take(slice(config.limit))
    split = some.decoded(config) if isinstance(some, Encoded) else some
    _check_size(split, config)
    return split


def _check_size(split: Split, config: DataConfig) -> None:
    found, wanted = tuple(split.images.shape[1:]), (config.channels, config.height, config.width)
    if found != wanted:
        raise ConfigError(
            f"the images are {'x'.join(map(str, found))} (channels x height x width), but data says"
            f" {'x'.join(map(str, wanted))}; set data.channels, data.height and data.width"
        )


def _check_labels(split: Stored, config: DataConfig) -> None:
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= config.classes:
        raise ConfigError(f"labels reach from {low} to {high}, but data.classes is {config.classes}")


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


def _cifar(kind: str, cache: Path, train: bool) -> Split:
    """torchvision's CIFAR10, or CIFAR100 with its fine labels."""
    import torchvision.datasets

    made: Any = getattr(torchvision.datasets, kind)(str(cache), train=train, download=True)
    images = torch.from_numpy(made.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.as_tensor(made.targets, dtype=torch.int64))


def _svhn(cache: Path, train: bool) -> Split:
    import torchvision.datasets

    made: Any = torchvision.datasets.SVHN(str(cache), split="train" if train else "test", download=True)
    return Split(torch.from_numpy(made.data), torch.as_tensor(made.labels, dtype=torch.int64))


def _fetched(name: str, read: Callable[[bool], Split]) -> tuple[Split, Split]:
    """Training and test split of a set that torchvision downloads. Raises ConfigError where it cannot be fetched."""
    try:
        return read(True), read(False)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"torchvision could not fetch {name}: {first_line(error)}; give --data.uri PATH instead"
        ) from error


DATASETS: dict[str, Callable[[Path], tuple[Split, Split | None]]] = {
    "digits": lambda cache: (_digits(), None),
    "cifar10": lambda cache: _fetched("cifar10", lambda train: _cifar("CIFAR10", cache, train)),
    "cifar100": lambda cache: _fetched("cifar100", lambda train: _cifar("CIFAR100", cache, train)),
    "svhn": lambda cache: _fetched("svhn", lambda train: _svhn(cache, train)),
}
"""How a set is loaded by its name: the folder of downloads -> training and test split, None where it has none."""


def _files(config: DataConfig, open_path: Callable[[str], Path]) -> tuple[list[Path], list[Path]]:
    """Parquet files or images under ``data.uri``, of the training and of the test split."""
    path = open_path(config.uri or "")
    try:
        exists = path.exists()
    except OSError as error:
        raise ConfigError(f"data.uri {str(path)!r} cannot be read: {first_line(error)}") from error
    if not exists:
        hint = "; python infra/photo_shards.py FOLDER writes small shards to try it with" if config.stream else ""
        raise ConfigError(f"data.uri {str(path)!r} does not exist{hint}")
    files = [path] if path.is_file() else sorted(path.glob("**/*.parquet"))
    if not files:
        files = sorted(f for f in path.glob("**/*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ConfigError(f"data.uri {str(path)!r} holds neither parquet files nor images")

    by_split: dict[str, list[Path]] = {}
    for file in files:
        parts = (file.name,) if path.is_file() else file.relative_to(path).parts
        named = parts if file.suffix == ".parquet" else parts[:-2]  # the last two are class and image
        found = [m[1] for part in named if (m := SPLIT_NAME.match(part.lower()))]
        by_split.setdefault(found[-1] if found else "train", []).append(file)
    train, test = by_split.get("train", []), by_split.get("test", by_split.get("val", []))
    if not train:
        raise ConfigError(f"data.uri {str(path)!r} has no training split: name its files or folders train*")
    return train, test


def split_sizes(config: DataConfig, open_path: Callable[[str], Path] = local_path) -> tuple[int, int, int]:
    """How many images are trained on, held out and tested on, without reading them.

    Raises ConfigError where ``data.uri`` is unusable.
    """
    if config.uri is None:
        whole, test = KNOWN_SIZES[config.name]
    else:
        training, testing = _files(config, open_path)
        whole, test = _rows(training), _rows(testing)
        if not testing:
            test = max(1, round(config.test_share * whole))
            whole -= test
    if config.limit is not None:
        whole, test = min(whole, config.limit), min(test, config.limit)
    held_out = max(1, round(config.held_out * whole))
    return whole - held_out, held_out, test


def _rows(files: list[Path]) -> int:
    """Images in files: rows of parquet, or the files themselves."""
    if not files or files[0].suffix != ".parquet":
        return len(files)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return sum(pq.ParquetFile(file.open("rb")).metadata.num_rows for file in files)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{files[0]} cannot be read as parquet: {first_line(error)}") from error


def _from_path(config: DataConfig, open_path: Callable[[str], Path]) -> tuple[Encoded, Encoded | None]:
    train, test = _files(config, open_path)
    if train[0].suffix.lower() not in IMAGE_SUFFIXES:
        return _parquet(train), (_parquet(test) if test else None)
    names = sorted({f.parent.name for f in train})
    return _folder(train, names, config), (_folder(test, names, config) if test else None)


def _parquet(files: list[Path]) -> Encoded:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.concat_tables([pq.read_table(f.open("rb")) for f in files])
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{files[0]} cannot be read as parquet: {first_line(error)}") from error
    if table.num_rows == 0:
        raise ConfigError(f"{files[0]} holds no rows")
    blobs, labels = columns(table, files[0])
    return Encoded(blobs, torch.tensor(labels, dtype=torch.int64))


def _folder(files: list[Path], names: list[str], config: DataConfig) -> Encoded:
    if len(names) > config.classes:
        raise ConfigError(f"there are {len(names)} class folders, but data.classes is {config.classes}")
    unknown = sorted({f.parent.name for f in files} - set(names))
    if unknown:
        raise ConfigError(f"the test split has classes that the training split has not: {', '.join(unknown)}")
    labels = torch.tensor([names.index(f.parent.name) for f in files])
    return Encoded(files, labels)
