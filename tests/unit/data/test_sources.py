"""Real images in, and one line about data that cannot be used."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits

from dircluster.config import ConfigError, DataConfig
from dircluster.data.layout import KNOWN_CLASSES, KNOWN_SHAPES, KNOWN_SIZES, check, split_sizes
from dircluster.data.sources import DATASETS, load
from tests.pictures import png


def config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"name": "custom", "uri": str(path), "height": 4, "width": 4, **changes})


def write(path: Path, images: list[Any], labels: list[Any] | None, image: str = "image", label: str = "label") -> None:
    columns: dict[str, Any] = {image: images}
    if labels is not None:
        columns[label] = labels
    pq.write_table(pa.table(columns), path)


def test_digits() -> None:
    data = load(DataConfig(), seed=0)
    assert (len(data.train), len(data.held_out), len(data.test)) == (1294, 144, 359)
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.max() == 255
    assert data.train.images.shape[1:] == (1, 8, 8)


def test_digits_are_those_of_scikit_learn_pixel_for_pixel() -> None:
    bunch, (found, _) = load_digits(), DATASETS["digits"](Path())
    assert found.images.shape == (1797, 1, 8, 8)
    assert np.array_equal(found.images[:, 0].numpy(), np.round(bunch.images * (255 / 16)).astype(np.uint8))
    assert found.labels.dtype == torch.int64
    assert found.labels.tolist() == bunch.target.tolist()


def test_the_test_split_is_the_same_for_every_seed_and_the_held_out_one_is_not() -> None:
    first, second = load(DataConfig(), seed=0), load(DataConfig(), seed=1)
    assert torch.equal(first.test.images, second.test.images)
    assert first.fingerprint == second.fingerprint
    assert not torch.equal(first.held_out.images, second.held_out.images)


def test_no_image_is_in_two_splits() -> None:
    data = load(DataConfig(), seed=0)
    parts = [part.images.flatten(1).tolist() for part in (data.train, data.held_out, data.test)]
    assert len({tuple(image) for part in parts for image in part}) == sum(map(len, parts)) == 1797


class FineLabels:
    """What torchvision's CIFAR100 holds after a download, which no test makes."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        rows, value = (20, 3) if train else (4, 5)
        self.data = np.full((rows, 32, 32, 3), value, np.uint8)
        self.data[:, 0, 1, 2] = 255
        self.targets = [80 + row for row in range(rows)]


def test_cifar100_from_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR100", FineLabels)
    wanted = DataConfig(name="cifar100", height=32, width=32, channels=3, classes=100)
    data = load(wanted, 0, tmp_path)
    assert (len(data.train), len(data.held_out), len(data.test)) == (18, 2, 4)
    assert data.test.images.shape == (4, 3, 32, 32)
    assert (data.test.images[:, 2, 0, 1] == 255).all()
    assert data.test.labels.tolist() == [80, 81, 82, 83]
    assert split_sizes(wanted) == (45_000, 5_000, 10_000)


def test_a_set_is_fetched_once_where_several_ask_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, fetched = tmp_path / "data", []

    class Slow(FineLabels):
        """Like torchvision's, which two at once break: each unpacks over what the other reads."""

        def __init__(self, root: str, train: bool, download: bool) -> None:
            there, partial = Path(root) / "whole", Path(root) / "partial"
            if download and not there.exists():
                partial.touch(exist_ok=False)
                time.sleep(0.2)
                partial.rename(there)
                fetched.append(train)
            if not there.exists():
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            super().__init__(root, train, download)

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Slow)
    with ThreadPoolExecutor(3) as threads:
        ended = list(threads.map(lambda _: DATASETS["cifar100"](cache), range(3)))
    assert [len(train) for train, _ in ended] == [20, 20, 20]
    assert fetched == [True]


def test_a_set_is_read_from_a_folder_that_takes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR100", FineLabels)
    DATASETS["cifar100"](tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_torchvision_cannot_fetch_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", absent)
    with pytest.raises(ConfigError, match=r"torchvision could not fetch cifar100: no network; give --data\.uri"):
        load(DataConfig(name="cifar100", height=32, width=32, channels=3, classes=100), 0, tmp_path)


def test_every_set_that_is_downloaded_has_a_known_size() -> None:
    assert set(DATASETS) == set(KNOWN_SIZES) == set(KNOWN_SHAPES) == set(KNOWN_CLASSES)


@pytest.mark.parametrize("ask", [check, lambda config: load(config, 0)])
def test_a_named_set_of_another_size_is_refused_before_it_is_fetched(ask: Any) -> None:
    with pytest.raises(ConfigError, match=r"the images are 3x32x32 .*, but data says 1x8x8; set data.channels"):
        ask(DataConfig(name="cifar10"))
    with pytest.raises(ConfigError, match=r"data\.classes is 10, but cifar100 has 100 classes"):
        ask(DataConfig(name="cifar100", height=32, width=32, channels=3))


def test_fine_labels_are_those_of_parquet_files_with_two_kinds(tmp_path: Path) -> None:
    table = {"img": [png()] * 20, "fine_label": list(range(80, 100)), "coarse_label": [1] * 20}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    data = load(config(tmp_path, name="cifar100", classes=100), seed=0)
    assert {*data.train.labels.tolist(), *data.held_out.labels.tolist(), *data.test.labels.tolist()} == {
        *range(80, 100)
    }


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    def cell(value: int) -> Any:
        return {"bytes": png(value=value), "path": None} if kind == "struct" else png(value=value)

    write(tmp_path / "train-0.parquet", [cell(i) for i in range(12)], [i % 3 for i in range(12)], "img")
    write(tmp_path / "test-0.parquet", [cell(99)] * 2, [0, 1], "img")
    data = load(config(tmp_path), seed=0)
    whole = torch.cat([data.train.images, data.held_out.images])
    assert sorted(whole[:, 0, 0, 0].tolist()) == list(range(12))
    assert data.test.images.unique().tolist() == [99]
    together = zip(
        whole[:, 0, 0, 0].tolist(), torch.cat([data.train.labels, data.held_out.labels]).tolist(), strict=True
    )
    assert all(value % 3 == label for value, label in together)
    assert split_sizes(config(tmp_path)) == (len(data.train), len(data.held_out), len(data.test))


def test_without_a_test_split_one_is_cut_off(tmp_path: Path) -> None:
    write(tmp_path / "all.parquet", [png(value=i) for i in range(20)], [0, 1] * 10)
    data = load(config(tmp_path / "all.parquet"), seed=0)
    assert (len(data.train), len(data.held_out), len(data.test)) == (14, 2, 4)
    assert split_sizes(config(tmp_path / "all.parquet"))[0] == 14


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_the_test_split_of_digits_is_as_large_as_asked(share: float) -> None:
    wanted = DataConfig(test_share=share)
    data = load(wanted, seed=0)
    assert split_sizes(wanted) == (len(data.train), len(data.held_out), len(data.test))


def test_image_folders(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / split / name / f"{i}.png").write_bytes(png(value=100 * number + i))
    data = load(config(tmp_path, classes=2), seed=0)
    assert len(data.test) == 4
    whole = torch.cat([data.train.images, data.held_out.images])[:, 0, 0, 0]
    assert torch.equal((whole >= 100).long(), torch.cat([data.train.labels, data.held_out.labels]))


def test_splits_are_found_in_folders_and_names(tmp_path: Path) -> None:
    for name, value in {"default/train/0.parquet": 1, "default/test/0.parquet": 2, "extra-0.parquet": 3}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, [png(value=value)] * 10, [0] * 10)
    data = load(config(tmp_path), seed=0)
    assert data.train.images.unique().tolist() == [1]
    assert data.test.images.unique().tolist() == [2]


def test_classes_of_the_test_split_are_those_of_the_training_split(tmp_path: Path) -> None:
    for split, names in (("train", ("ant", "valley", "testudo")), ("test", ("valley", "testudo"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(5):
                (tmp_path / split / name / f"{i}.PNG").write_bytes(png(value=ord(name[0])))
    data = load(config(tmp_path, classes=3), seed=0)
    expected = {ord("a"): 0, ord("t"): 1, ord("v"): 2}
    for part in (data.train, data.held_out, data.test):
        assert [expected[v] for v in part.images[:, 0, 0, 0].tolist()] == part.labels.tolist()
    (tmp_path / "test" / "wasp").mkdir()
    (tmp_path / "test" / "wasp" / "0.png").write_bytes(png())
    with pytest.raises(ConfigError, match="classes that the training split has not: wasp"):
        load(config(tmp_path, classes=3), seed=0)


@pytest.mark.parametrize(
    ("images", "labels", "changes", "message"),
    [
        ([png(), png(side=5)], [0, 1], {}, "2 different sizes (4x4, 5x5, ...)"),
        ([png()] * 9, None, {}, "has no integer column label or labels"),
        ([png()] * 9, ["cat"] * 9, {}, "has no integer column"),
        ([png()] * 9, [0, None] * 4 + [1], {}, "4 rows without a label"),
        ([1] * 9, [0] * 9, {}, "has no column of image bytes"),
        ([b"nonsense"] * 9, [0] * 9, {}, "an image cannot be read"),
        ([*[png()] * 8, None], [0] * 9, {}, "an image cannot be read"),
        ([png()] * 9, [0] * 8 + [10], {}, "labels reach from 0 to 10, but data.classes is 10"),
        ([png()] * 9, [0] * 9, {"height": 8, "width": 8}, "the images are 1x4x4"),
        ([], [], {}, "holds no rows"),
    ],
)
def test_unusable_parquet(tmp_path: Path, images: Any, labels: Any, changes: dict[str, Any], message: str) -> None:
    write(tmp_path / "x.parquet", images, labels)
    with pytest.raises(ConfigError) as refusal:
        load(config(tmp_path / "x.parquet", **changes), seed=0)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_missing_empty_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(config(tmp_path / "nowhere"), seed=0)
    with pytest.raises(ConfigError, match="neither parquet files nor images"):
        load(config(tmp_path), seed=0)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        load(config(tmp_path), seed=0)


def test_real_svhn_and_cifar10(real_data: Path) -> None:
    svhn = load(DataConfig(name="svhn", uri=str(real_data / "svhn"), height=32, width=32, channels=3), seed=0)
    assert len(svhn.train) + len(svhn.held_out) + len(svhn.test) == 1083
    one = str(real_data / "cifar10" / "test-00000-of-00001.parquet")
    with pytest.raises(ConfigError, match="no training split"):
        load(DataConfig(name="cifar10", uri=one, height=32, width=32, channels=3), seed=0)
