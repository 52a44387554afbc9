"""Files and folders as people have them: the right split and label of each image, or one line."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dircluster.config import ConfigError, DataConfig, local_path
from dircluster.data.layout import check, layout_of, split_sizes
from dircluster.data.sources import load
from dircluster.data.split import Dataset
from dircluster.data.split_names import split_name
from tests.pictures import png


def grow(root: Path, tree: dict[str, int | str]) -> None:
    """Files by their names: a number is the gray of four images (or of a parquet file of twenty), a text is written."""
    for name, value in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, str):
            path.write_text(value)
        elif path.suffix.lower() in (".parquet", ".pq"):
            pq.write_table(pa.table({"image": [png(value)] * 20, "label": [value % 10] * 20}), path)
        else:
            for i in range(4):
                path.with_stem(f"{path.stem}{i}").write_bytes(png(value))


def read(root: Path, **changes: Any) -> Dataset:
    """What is read; ``classes`` are as many as class folders where they are not given, and ten for tables."""
    wanted: dict[str, Any] = {"name": "custom", "uri": str(root), "height": 4, "width": 4, "classes": 10}
    config = DataConfig(**wanted | changes)
    if "classes" not in changes and (folders := layout_of(config, local_path).folders):
        config = dataclasses.replace(config, classes=len(folders.names))
    data = load(config, 0)
    if not config.stream:
        assert split_sizes(config) == (len(data.train), len(data.held_out), len(data.test))
    return data


def seen(data: Dataset) -> tuple[dict[int, int], dict[int, int]]:
    """Labels by gray, of what is trained on and of the test split."""
    parts = [(data.train, data.held_out), (data.test,)]
    train, test = (
        {
            gray: label
            for s in part
            for gray, label in zip(s.images[:, 0, 0, 0].tolist(), s.labels.tolist(), strict=True)
        }
        for part in parts
    )
    return train, test


CLASSES: dict[str, int | str] = {
    "train/cat/x.png": 10,
    "train/dog/x.png": 20,
    "test/cat/x.png": 11,
    "test/dog/x.png": 21,
}
READ: dict[str, dict[str, int | str]] = {
    "hidden and system files": {
        ".trash/cat/x.png": 99,
        ".old/train/ant/x.png": 99,
        "train/.trash/x.png": 99,
        "train/.ipynb_checkpoints/x.png": 99,
        "train/cat/.ipynb_checkpoints/x.png": 99,
        "__MACOSX/train/cat/._x.png": "",
        "train/cat/._x.png": "",
        "train/cat/.DS_Store": "",
        "train/dog/Thumbs.db": "",
        "test/dog/desktop.ini": "",
    },
    "other suffixes": {"train/cat/y.TIF": 10, "train/dog/y.gif": 20, "test/dog/y.ppm": 21},
    "side files": {"README.md": "", "labels.csv": "", "train/labels.csv": "", "train/cat/boxes.txt": "", "LICENSE": ""},
    "what systems keep": {
        "train/_trash/x.png": 99,
        "_MACOSX/cat/x.png": 99,
        "train/Recycled/x.png": 99,
        "train/$RECYCLE.BIN/x.png": 99,
        "train/System Volume Information/x.png": 99,
        "train/lost+found/x.png": 99,
        "train/LOST.DIR/x.png": 99,
        "test/_trash/x.png": 99,
    },
    "photos of a camera": {"train/cat/_MG_0001.JPG": "", "train/cat/_MG_.png": 10, "test/dog/_MG_.png": 21},
    "extra": {"extra/cat/x.png": 99, "unlabeled/x/x.png": 99},
    "val beside test": {"val/cat/x.png": 99},
}


@pytest.mark.parametrize("name", READ)
def test_what_lies_beside_classes_moves_no_label(tmp_path: Path, name: str) -> None:
    grow(tmp_path, CLASSES | READ[name])
    if (photo := tmp_path / "train" / "cat" / "_MG_0001.JPG").exists():
        photo.write_bytes(png(10))
    data = read(tmp_path)
    assert seen(data) == ({10: 0, 20: 1}, {11: 0, 21: 1})
    assert data.classes == ("cat", "dog")


@pytest.mark.parametrize("classes", [2, 4])
def test_other_than_data_classes_class_folders_are_refused(tmp_path: Path, classes: int) -> None:
    grow(tmp_path, {f"{name}/x.png": gray for gray, name in enumerate(("glass", "organic", "paper"))})
    wanted = DataConfig(name="custom", uri=str(tmp_path), height=4, width=4, classes=classes)
    for ask in (check, lambda config: load(config, 0)):
        with pytest.raises(ConfigError, match=f"^there are 3 class folders, but data.classes is {classes}$"):
            ask(wanted)


def test_a_class_that_is_called_as_a_systems_folder_is_named(tmp_path: Path) -> None:
    grow(tmp_path, {f"{name}/x.png": gray for gray, name in enumerate(("glass", "organic", "recycled"))})
    said = "2 class folders, but data.classes is 3; left out, as systems use such names or they begin with _: recycled"
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, classes=3)
    assert seen(read(tmp_path, classes=2))[0] == {0: 0, 1: 1}


def test_what_might_have_been_a_class_is_said_to_be_left_out(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES | {"train/_trash/x.png": 99, "test/_trash/x.png": 99, "train/Recycled/x.png": 99})
    assert read(tmp_path).notes[0] == "left out, as systems use such names or they begin with _: Recycled, _trash"
    grow(tmp_path / "alone", {"_set/train/cat/x.png": 1})
    with pytest.raises(ConfigError, match=r"neither parquet files nor images; left out, .*: _set"):
        read(tmp_path / "alone")


def test_a_name_that_breaks_the_line_is_quoted(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES | {"train/a\nb/x.png": 1})
    assert read(tmp_path).notes[0] == r"classes 0 to 2 are 'a\nb', cat, dog"
    grow(tmp_path, {"test/c\nd/x.png": 1})
    with pytest.raises(ConfigError, match=r"the training split has not: 'c\\nd'"):
        read(tmp_path)


LAYOUTS: dict[str, tuple[dict[str, int | str], dict[int, int], dict[int, int]]] = {
    "no splits": ({"ant/x.png": 1, "bee/x.png": 2, "cat/x.gif": 3}, {1: 0, 2: 1, 3: 2}, {1: 0, 2: 1, 3: 2}),
    "a folder above": ({"set/ant/x.png": 1, "set/bee/x.png": 2}, {1: 0, 2: 1}, {1: 0, 2: 1}),
    "classes like splits": (
        {"tests/x.png": 1, "trainers/x.png": 2, "trains/x.png": 3, "valley/x.png": 4},
        {1: 0, 2: 1, 3: 2, 4: 3},
        {1: 0, 2: 1, 3: 2, 4: 3},
    ),
    "a class called train": (
        {"bus/x.png": 1, "car/x.png": 2, "train/x.png": 3},
        {1: 0, 2: 1, 3: 2},
        {1: 0, 2: 1, 3: 2},
    ),
    "classes called as splits, in splits": (
        {f"{split}/{name}/x.png": value for split in ("train", "test") for name, value in (("test", 1), ("train", 2))},
        {1: 0, 2: 1},
        {1: 0, 2: 1},
    ),
    "words": ({"Training/a/x.png": 1, "Training/b/x.png": 2, "dev/a/x.png": 3}, {1: 0, 2: 1}, {3: 0}),
    "words in names": (
        {"my_train_set/a/x.png": 1, "my_train_set/b/x.png": 2, "my_test_set/b/x.png": 3},
        {1: 0, 2: 1},
        {3: 1},
    ),
    "tiny imagenet": (
        {
            "train/n01/images/n01_.JPEG": 1,
            "train/n01/n01_boxes.txt": "",
            "train/n02/images/n02_.JPEG": 2,
            "val/images/v.JPEG": 3,
            "val/val_annotations.txt": "".join(f"v{i}.JPEG\tn02\t0\t0\t4\t4\n" for i in range(4)),
            "test/images/t.JPEG": 9,
            "wnids.txt": "",
        },
        {1: 0, 2: 1},
        {3: 1},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_folders(tmp_path: Path, name: str) -> None:
    tree, train, test = LAYOUTS[name]
    grow(tmp_path, tree)
    found, tested = seen(read(tmp_path))
    assert found == train
    assert tested.items() <= test.items()
    assert bool(tested)


COMPOSED, APART = "caf\u00e9", "cafe\u0301"
"""One name, as Linux and as older Macs write it."""


@pytest.mark.parametrize("trained", [COMPOSED, APART])
@pytest.mark.parametrize("tested", [COMPOSED, APART])
def test_a_class_is_one_however_its_accents_are_written(tmp_path: Path, trained: str, tested: str) -> None:
    grow(tmp_path, {f"train/{trained}/x.png": 2, "train/cafz/x.png": 1, f"test/{tested}/x.png": 3})
    assert seen(read(tmp_path)) == ({1: 0, 2: 1}, {3: 1})


@pytest.mark.parametrize(
    ("names", "note"),
    [
        ([str(number) for number in range(11)], "class 2 is 10, not 2: folders go in the order of texts"),
        (["n9b", "n10a"], "class 0 is n10a, not n9b: folders"),
        ([f"{number:02}" for number in range(11)], None),
        (["a", "a-1", "a1", "b"], None),
        ([APART, "cafz"], None),
    ],
)
def test_numbers_of_classes_that_are_not_in_their_order_are_noted(
    tmp_path: Path, names: list[str], note: str | None
) -> None:
    grow(tmp_path, {f"{name}/x.png": place for place, name in enumerate(names)})
    noted = [one for one in read(tmp_path).notes if "order of texts" in one]
    assert len(noted) == (note is not None)
    assert (note or "") in "".join(noted)


def test_a_class_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    grow(tmp_path, {"a/x.png": 1, os.fsdecode(b"caf\xe9") + "/x.png": 2})
    with pytest.raises(ConfigError, match=r"the class folder 'caf\\udce9' of data\.uri is no UTF-8: rename it"):
        read(tmp_path)


REFUSED: dict[str, tuple[dict[str, int | str], str]] = {
    "masks": ({"a/x.png": 1, "a/x0_mask_1.png": "", "b/x.png": 2}, "x0_mask_1.png may be the mask of 'x0' beside it"),
    "masks of a test split": (CLASSES | {"test/dog/x1-Segmentation.PNG": ""}, "may be the mask of 'x1'"),
    "two training splits": (
        CLASSES | {"train_aug/cat/x.png": 9},
        "several folders of one split ('train', 'train_aug')",
    ),
    "letters": (CLASSES | {"Train/cat/x.png": 9}, "several folders of one split"),
    "two test splits": (CLASSES | {"test_hard/cat/x.png": 9}, "several folders of one split ('test', 'test_hard')"),
    "two data sets": (
        {f"{s}/train/{c}/x.png": 1 for s in ("one", "two") for c in "ab"},
        "several folders of one split ('one/train', 'two/train')",
    ),
    "two data sets without splits": ({"one/a/x.png": 1, "two/b/x.png": 1}, "holds the folder 'a', and either could be"),
    "superclasses": ({"train/pet/cat/x.png": 1, "train/wild/cat/x.png": 2}, "holds the folder 'cat'"),
    "flat": ({"x.png": 1, "labels.csv": "x0.png,3"}, "lists of labels such as labels.csv are not read"),
    "flat splits": ({"train/x.png": 1, "test/x.png": 2}, "lies in no class folder"),
    "a loose image": (CLASSES | {"train/x.png": 1}, "x0.png lies in no class of a split"),
    "a folder beside splits": (CLASSES | {"old/cat/x.png": 1}, "x0.png lies in no class of a split"),
    "arrays": (CLASSES | {"train/cat/x.npy": ""}, "x.npy is no image that is read"),
    "photos of a phone": (CLASSES | {"train/cat/x.HEIC": ""}, "x.HEIC is no image that is read"),
    "a class of arrays": (CLASSES | {"train/elk/x.npy": ""}, "class folder 'elk' of train holds no image"),
    "one class": ({"train/cat/x.png": 1}, "one class folder alone, 'cat'"),
    "one class in two ways": (
        {"train/cat/x.png": 1, "train/Cat/x.png": 2},
        "'Cat' and 'cat' of train may be one class",
    ),
    "no annotation": (
        {"train/a/x.png": 1, "train/b/x.png": 1, "val/images/v.png": 1, "val/val_annotations.txt": ""},
        "val_annotations.txt has no line for v0.png",
    ),
    "only a test split": ({"test/a/x.png": 1, "test/b/x.png": 2}, "has no training split"),
    "archives": ({"train.zip": ""}, "neither parquet files nor images (but train.zip)"),
    **{
        f"{name} beside {train}": ({train: 1, "train/b/x.png": 2, name: ""}, f"{name} says by its name that it is of")
        for train in ("train/a/x.png", "train.parquet")
        for name in ("test.zip", "test.arrow", "test.csv", "test.jsonl", "test.parquet.gz", "test", "my-test.tar")
    },
    "only val is read": (
        {"train.parquet": 1, "val.parquet": 2, "test.arrow": ""},
        "test.arrow says by its name that it is of the split test, and is not read: bring it into the form of the rest",
    ),
    "a val that is not read": (
        {"train.parquet": 1, "dev.arrow": ""},
        "dev.arrow says by its name that it is of the split val",
    ),
    "a training split that is not read": (
        {"data.parquet": 1, "train/0.arrow": ""},
        "0.arrow says by its name that it is of the split train",
    ),
    "pictures beside a table": (
        {"train.parquet": 1, "test/cat/x.png": 2},
        "x0.png says by its name that it is of the split test",
    ),
    **{
        f"images in {name} beside classes": (
            {"cat/x.png": 1, "dog/x.png": 2, f"{name}/x.png": 3},
            f"lies in a folder called as a split, '{name}', beside class folders",
        )
        for name in ("test", "Validation", "testSet", "unlabeled")
    },
    **{
        f"{name} beside classes": ({"a/x.png": 1, "b/x.png": 2, name: ""}, f"{name} says by its name that it is of")
        for name in ("train_test_split.txt", "test_list.mat", "test_labels.csv", "splits.json", "train_val.csv")
    },
    "a list beside classes": ({"a/x.png": 1, "b/x.png": 2, "test.txt": ""}, "test.txt says by its name"),
}


def test_unread_files_of_splits_that_are_read_are_left_alone(tmp_path: Path) -> None:
    lists: dict[str, int | str] = {
        f"{split}.{kind}": "" for split in ("train", "test") for kind in ("csv", "zip", "arrow")
    }
    code: dict[str, int | str] = {
        "train.py": "",
        "eval.ipynb": "",
        "test.log": "",
        "contest.zip": "",
        "image_class_labels.txt": "",
        "dataset_infos.json": "",
    }
    lists |= {"train_test_split.csv": "", "test_list.txt": "", "splits.json": ""}
    grow(tmp_path, CLASSES | lists | {"val.txt": ""} | code)
    assert seen(read(tmp_path)) == ({10: 0, 20: 1}, {11: 0, 21: 1})
    grow(tmp_path / "other", {"a/x.png": 1, "b/x.png": 2, "test_notes.txt": ""} | code)
    assert seen(read(tmp_path / "other"))[0] == {1: 0, 2: 1}


@pytest.mark.parametrize("tree", [{"x.parquet": 1}, {f"{name}/x.png": 1 for name in "abcde"}])
def test_a_test_split_that_is_cut_off_is_noted(tmp_path: Path, tree: dict[str, int | str]) -> None:
    grow(tmp_path, tree)
    assert "no test split is there: 4 of the 20 images are (data.test_share)" in read(tmp_path).notes
    grow(tmp_path / "whole", CLASSES)
    assert not any("data.test_share" in note for note in read(tmp_path / "whole").notes)


VAL: dict[str, int | str] = {name.replace("test/", "dev/"): gray for name, gray in CLASSES.items()}


@pytest.mark.parametrize(
    ("tree", "taken"),
    [
        ({"train.parquet": 1, "validation-0.parquet": 3}, "validation-0.parquet"),
        (VAL, "dev"),
        (VAL | {"test/images/x.png": 9}, "dev"),  # which has no labels
        ({"train.parquet": 1, "val.parquet": 3, "test.parquet": 4}, None),
        (VAL | CLASSES, None),
    ],
)
def test_a_validation_split_that_stands_for_the_test_split_is_noted(
    tmp_path: Path, tree: dict[str, int | str], taken: str | None
) -> None:
    grow(tmp_path, tree)
    noted = [note for note in read(tmp_path).notes if note.startswith("no test split is read")]
    assert noted == ([f"no test split is read: {taken} is taken for it"] if taken else [])


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_say_two_things_are_refused(tmp_path: Path, name: str) -> None:
    tree, words = REFUSED[name]
    grow(tmp_path, tree)
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_empty_class_folder_is_refused(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES)
    (tmp_path / "train" / "ape").mkdir()
    with pytest.raises(ConfigError, match="'ape' of train holds no image"):
        read(tmp_path)


def test_links_are_followed_and_never_in_a_circle(tmp_path: Path) -> None:
    disk, root = tmp_path / "disk", tmp_path / "root"
    grow(disk, {"train/cat/x.png": 10, "d/x.png": 20, "test/cat/x.png": 11, "test/dog/x.png": 21})
    root.mkdir()
    (root / "train").symlink_to(disk / "train")
    (root / "test").symlink_to(disk / "test")
    (disk / "train" / "dog").symlink_to(disk / "d")
    (disk / "train" / "cat" / "images").symlink_to(disk / "train")
    assert seen(read(root)) == ({10: 0, 20: 1}, {11: 0, 21: 1})
    (root / "val").symlink_to(tmp_path / "not mounted")
    with pytest.raises(ConfigError, match="val is a link to nothing"):
        read(root)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    grow(tmp_path, CLASSES)
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    with pytest.raises(ConfigError, match=r"pipe\.png is a link to nothing, or no regular file"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["x.png", "x.zip"])
def test_one_file_that_is_no_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(png(1))
    with pytest.raises(ConfigError, match="neither a folder nor a parquet file"):
        read(tmp_path / name)


TABLES: dict[str, dict[str, int | str]] = {
    "hub": {"train-00000-of-00002.parquet": 1, "train-00001-of-00002.parquet": 2, "test-00000-of-00001.parquet": 3},
    "named": {"cifar10-train.parquet": 1, "cifar10-test.parquet": 3},
    "test alone is named": {"cifar10.parquet": 1, "cifar10-test.parquet": 3},
    "partial": {"partial-train/0000.parquet": 1, "partial-test/0000.parquet": 3},
    "testing": {"training-0.parquet": 1, "testing-0.parquet": 3},
    "dev": {"train.parquet": 1, "dev.parquet": 3},
    "letters": {"TRAIN.PARQUET": 1, "Test.Parquet": 3},
    "camel": {"trainSet.parquet": 1, "testSet.parquet": 3},
    "another suffix": {"train.pq": 1, "valid.pq": 3},
    "dots": {"train.snappy.parquet": 1, "x.test.parquet": 3},
    "hive": {"split=train/0.parquet": 1, "split=validation/0.parquet": 3},
    "hidden": {".old/train.parquet": 9, "train.parquet": 1, "test.parquet": 3, "._test.parquet": ""},
    "extra": {"train.parquet": 1, "test.parquet": 3, "extra.parquet": 9, "unsupervised-0.parquet": 9, "dev.parquet": 8},
    "hashes": {"train/part-0-4f1c9.parquet": 1, "train/part-1-77ab0.parquet": 2, "test/part-0-1d.parquet": 3},
    "beside text": {"train.parquet": 1, "test.parquet": 3, "README.md": "", "dataset_infos.json": ""},
    **{
        f"hive, {key}": {f"{key}=train/0.parquet": 1, f"{key}=test/0.parquet": 3}
        for key in ("set", "fold", "phase", "mode", "part", "split_name", "Stage")
    },
    "hive, a word": {"file=cifar_train/0.parquet": 1, "file=cifar_test/0.parquet": 3},
    "hive, below": {"split=train/fold=0/0.parquet": 1, "split=train/fold=1/0.parquet": 2, "split=test/0.parquet": 3},
    "hive, above": {
        "day=1/split=train/0.parquet": 1,
        "day=2/split=train/0.parquet": 2,
        "day=1/split=test/0.parquet": 3,
    },
    "spark": {
        "train/_SUCCESS": "",
        "train/_temporary/0/part-00000.parquet": 9,
        "train/_metadata.parquet": 9,
        "train/part-00000-3f2504e0-4f89-11d3-9a0c-0305e82c3301-c000.snappy.parquet": 1,
        "train/part-00007-3f2504e0-4f89-11d3-9a0c-0305e82c3301-c000.snappy.parquet": 2,
        "test/part-00000-7a0b04e0-4f89-11d3-9a0c-0305e82c3301-c000.snappy.parquet": 3,
    },
    "spark, partitioned": {
        "split=train/label=1/part-00000-3f2504e0-4f89-11d3-9a0c-0305e82c3301.c000.parquet": 1,
        "split=train/label=2/part-00003-3f2504e0-4f89-11d3-9a0c-0305e82c3301.c000.parquet": 2,
        "split=test/label=3/part-00000-3f2504e0-4f89-11d3-9a0c-0305e82c3301.c000.parquet": 3,
    },
    "delta": {"_delta_log/00000000000000000010.checkpoint.parquet": 9, "train/0.parquet": 1, "test/0.parquet": 3},
    "hub, with hashes": {
        "data/train-00000-of-00002-1359597a978bc4fa.parquet": 1,
        "data/train-00001-of-00002-abcdefabcdefabcd.parquet": 2,
        "data/valid-00000-of-00001-70d52db3c749a935.parquet": 3,
    },
    "chunks in folders": {
        "train/chunk-000/file-000.parquet": 1,
        "train/chunk-001/file-000.parquet": 2,
        "test/chunk-000/file-000.parquet": 3,
    },
    "two ways to number": {"train-0.parquet": 1, "train_1.parquet": 2, "test.parquet": 3},
    "numbers alone": {"train/0.parquet": 1, "train/1.parquet": 2, "test/0.parquet": 3},
    "a number in the name": {"cifar10-train-1.parquet": 1, "cifar10-train-2.parquet": 2, "cifar10-test.parquet": 3},
    "a version in the name": {"train-v2-0.parquet": 1, "train-v2-1.parquet": 2, "test-v2-0.parquet": 3},
}


@pytest.mark.parametrize("name", TABLES)
def test_no_test_row_is_trained_on(tmp_path: Path, name: str) -> None:
    """Grays 1 and 2 are of training shards, all of which are read, 3 of test shards, and 8 and 9 of no split."""
    grow(tmp_path, TABLES[name])
    shards = {gray: gray for gray in TABLES[name].values() if gray in (1, 2)}
    assert seen(read(tmp_path)) == (shards, {3: 3})


MIXED: dict[str, tuple[dict[str, int | str], str]] = {
    "augmented": (
        {"train.parquet": 1, "train_aug.parquet": 2, "test.parquet": 3},
        "2 sets of files for one split: train, train aug",
    ),
    "two sets": ({"cifar.parquet": 1, "svhn.parquet": 2}, "2 sets of files for one split: cifar, svhn"),
    "two configurations": ({"a/train/0.parquet": 1, "b/train/0.parquet": 2}, "holds several data sets ('a', 'b')"),
    "a stranger": (
        {"train.parquet": 1, "test.parquet": 3, "more.parquet": 2},
        "more.parquet says by no name which split",
    ),
    "two words": ({"train_test.parquet": 1}, "names the splits test and train at once"),
    "folder against file": (
        {"train/test-0.parquet": 1, "train/train-0.parquet": 1},
        "says another split than 'test-0'",
    ),
    "two test splits": (
        {"train.parquet": 1, "test_easy.parquet": 2, "test_hard.parquet": 3},
        "test easy, test hard",
    ),
    "test alone": ({"my-test.parquet": 1}, "has no training split"),
    "two sets below the split": (
        {"train/cifar/0.parquet": 1, "train/svhn/0.parquet": 2, "test/cifar/0.parquet": 3},
        "2 sets of files for one split: train/cifar/0, train/svhn/0",
    ),
    "an old copy": ({"train/0.parquet": 1, "train/old/0.parquet": 2, "test/0.parquet": 3}, "train/0, train/old/0"),
    "file and folder": ({"train.parquet": 1, "train/0.parquet": 2, "test.parquet": 3}, "train, train/0"),
    "file and folder of hashes": (
        {"train.parquet": 1, "train/3f2504e0-4f89-11d3-9a0c-0305e82c3301.parquet": 2},
        "train, train/...",
    ),
    "downloaded twice": ({"train.parquet": 1, "train (1).parquet": 2, "test.parquet": 3}, "train, train 1"),
    "copied": ({"train/0.parquet": 1, "train/0 (copy).parquet": 1, "test/0.parquet": 3}, "train/0, train/0 copy"),
    "delta, overwritten": (
        {"train/0.parquet": 1, "train/1.parquet": 2, "train/_delta_log/01.json": '{"remove":{"path":"0.parquet"}}'},
        "01.json: the Delta table has removed files that still lie there",
    ),
    "two suffixes": ({"train.parquet": 1, "train.pq": 1, "test.parquet": 3}, "train.pq may be one file twice"),
    "two spellings": ({"train.parquet": 1, "test.parquet": 3, "Test.parquet": 3}, "test.parquet may be one file twice"),
    "two separators": ({"train/data-0.parquet": 1, "train/data_0.parquet": 1, "test.parquet": 3}, "data_0.parquet may"),
    "two versions": (
        {"train-v1.parquet": 1, "train-v2.parquet": 2, "test.parquet": 3},
        "train v1, train v2; name one of them extra-*, or move it away (shards of one set are numbered from 0",
    ),
    "two sizes": ({"train-224.parquet": 1, "train-32.parquet": 2, "test.parquet": 3}, "train 224, train 32"),
    "two sets with numbers": (
        {"cifar10-train.parquet": 1, "cifar100-train.parquet": 2, "cifar10-test.parquet": 3},
        "cifar10 train, cifar100 train",
    ),
    "two sets with numbers, no split": ({"cifar10.parquet": 1, "cifar100.parquet": 2}, "cifar10, cifar100"),
    "two ways to cut": (
        {"train-00000-of-00001.parquet": 1, "train-00000-of-00002.parquet": 2, "train-00001-of-00002.parquet": 2},
        "train * of 00001, train * of 00002; name one of them extra-*, or move it away",
    ),
    "two test sets": ({"train.parquet": 1, "test/a/0.parquet": 2, "test/b/0.parquet": 3}, "test/a/0, test/b/0"),
    "hive, two words": ({"set=train/phase=test/0.parquet": 1}, "'set=train' says another split than 'phase=test'"),
    "hive, a truth value": ({"is_test=0/0.parquet": 1, "is_test=1/0.parquet": 2}, "call the folder split=train"),
}


@pytest.mark.parametrize("name", MIXED)
def test_files_that_could_be_two_splits_are_refused(tmp_path: Path, name: str) -> None:
    tree, words = MIXED[name]
    grow(tmp_path, tree)
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_table_that_leaves_nothing_to_train_on_is_refused_unread(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1)], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"data\.held_out 0\.1 leaves nothing of 0 images to train on"):
        check(DataConfig(name="custom", uri=str(tmp_path), height=4, width=4))


def test_a_missing_shard_is_noted(tmp_path: Path) -> None:
    grow(tmp_path, {"train-00000-of-00003.parquet": 1, "train-00002-of-00003.parquet": 2, "test.parquet": 3})
    assert "2 of 3 shards of train are there" in read(tmp_path).notes


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train2017", "train"), ("val_256", "val"), ("ILSVRC2012_val", "val"), ("trainval", "train")),
        *(("testset", "test"), ("TestImages", "test"), ("tst", "test"), ("evaluation", "val")),
        *(("tests", None), ("trainers", None), ("trains", None), ("valley", None), ("contest", None), ("latest", None)),
        *(("retrained", None), ("devices", None), ("extract", None), ("data", None), ("set", None), ("2024", None)),
    ],
)
def test_words_of_splits(name: str, split: str | None) -> None:
    found = split_name(name)
    assert (found.split if found else None) == split
