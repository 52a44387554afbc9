"""Columns, labels and damage of parquet files: right, or one line; in memory and as a stream."""

from __future__ import annotations

import decimal
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dircluster.config import ConfigError, DataConfig
from dircluster.data.layout import check
from dircluster.data.sources import load
from dircluster.data.split import Dataset
from dircluster.data.stream import Shards, StreamLoader
from tests.pictures import png

ROWS = 20


PNGS = [png(i) for i in range(ROWS)]
LABELS = [i % 10 for i in range(ROWS)]
OTHERS = [png(200)] * ROWS


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"name": "custom", "uri": str(root), "height": 4, "width": 4} | changes)


def write(path: Path, names: Mapping[str, list[str] | dict[str, str] | float] | None = None, **columns: Any) -> None:
    """A table; ``names`` of classes, or their number, by column, as Hugging Face's datasets stores them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if names:
        features = {
            name: {"names" if isinstance(of, list | dict) else "num_classes": of, "_type": "ClassLabel"}
            for name, of in names.items()
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=5)


def right(data: Dataset) -> bool:
    """Whether every image has the label that its gray says."""
    parts = [data.held_out, data.test, *([data.train] if not isinstance(data.train, Shards) else [])]
    return all(torch.equal(part.images[:, 0, 0, 0] % 10, part.labels) for part in parts)


def notes(data: Dataset) -> tuple[str, ...]:
    """What is said, but for what these tests do: their splits often are of the same images."""
    return tuple(note for note in data.notes if "pixel for pixel" not in note)


def struct(blobs: list[bytes]) -> list[dict[str, Any]]:
    return [{"path": "a.png", "bytes": blob} for blob in blobs]


IMAGES: dict[str, Any] = {
    "binary": pa.array(PNGS, pa.binary()),
    "large": pa.array(PNGS, pa.large_binary()),
    "view": pa.array(PNGS, pa.binary_view()),
    "fixed size": pa.array([blob.ljust(100, b"\0") for blob in PNGS], pa.binary(100)),
    "struct": pa.array(struct(PNGS)),
    "dictionary": pa.array(PNGS, pa.binary()).dictionary_encode(),
    "chunks": pa.chunked_array([PNGS[:7], PNGS[7:]]),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_bytes_of_images(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x.parquet", image=IMAGES[kind], label=LABELS)
    assert right(load(config(tmp_path), 0))


NUMBERS: dict[str, Any] = {
    **{str(kind): pa.array(LABELS, kind) for kind in (pa.int8(), pa.uint8(), pa.uint16(), pa.int32(), pa.uint64())},
    "whole floats": pa.array(LABELS, pa.float32()),
    "decimals": pa.array([decimal.Decimal(label) for label in LABELS], pa.decimal128(5, 2)),
    "categories": pa.array(LABELS).dictionary_encode(),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_labels_that_are_integers_without_a_doubt(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "x.parquet", image=PNGS, label=NUMBERS[kind])
    assert right(load(config(tmp_path), 0))


def test_two_classes_as_truth_values(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", image=[png(i % 2) for i in range(ROWS)], label=[i % 2 == 1 for i in range(ROWS)])
    assert right(load(config(tmp_path, classes=2), 0))


BAD_LABELS: dict[str, tuple[Any, str]] = {
    "texts": ([str(label) for label in LABELS], "'label' holds string; write integers from 0"),
    "lists": ([[label] for label in LABELS], "'label' holds list"),
    "structs": ([{"id": label} for label in LABELS], "'label' holds struct"),
    "halves": ([label + 0.5 for label in LABELS], "row 0: the label 0.5 is no whole number"),
    "infinite": ([*map(float, LABELS[:-1]), float("inf")], "row 19: the label inf is no whole number"),
    "no number": ([*map(float, LABELS[:-1]), float("nan")], "1 rows without a label in 'label', the first is row 19"),
    "null": ([0, None, *LABELS[2:]], "1 rows without a label in 'label', the first is row 1"),
    "from 1": ([label + 1 for label in LABELS], "labels count from 0: subtract 1"),
    "unlabeled": ([-1, *LABELS[1:]], "row 0, has -1); 1 rows below 0 (often: unlabeled)"),
    "too many": ([*LABELS[:-1], 255], "row 19, has 255)"),
    "huge": (pa.array([*LABELS[:-1], 2**63], pa.uint64()), "labels reach from 0 to 9223372036854775808"),
    "names": (["cat", "dog"] * 10, "has no integer column of labels: 'label' holds string"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
@pytest.mark.parametrize("stream", [False, True])
def test_other_labels_are_one_line(tmp_path: Path, name: str, stream: bool) -> None:
    labels, words = BAD_LABELS[name]
    write(tmp_path / "train.parquet", image=PNGS, label=labels)
    write(tmp_path / "test.parquet", image=PNGS, label=LABELS)
    with pytest.raises(ConfigError) as refusal:
        load(config(tmp_path, stream=stream), 0)
    assert words in str(refusal.value)
    assert "train.parquet" in str(refusal.value)
    assert "\n" not in str(refusal.value)


HALVES = [False] * (ROWS // 2) + [True] * (ROWS // 2)
SPLITS: dict[str, tuple[str, Any]] = {
    "texts": ("split", ["train" if half else "test" for half in HALVES]),
    "words of a set": ("Usage", ["Training", *["PublicTest"] * 9, *["PrivateTest"] * 9, None]),
    "another name": ("phase.name", ["dev" if half else "train" for half in HALVES]),
    "categories": ("part", pa.array(["val" if half else "train" for half in HALVES]).dictionary_encode()),
    "words of nobody else": ("data_split", ["tr" if half else "te" for half in HALVES]),
    "numbers": ("split", [int(half) for half in HALVES]),
    "truth values": ("is_test", HALVES),
    "zero and one": ("is_training_image", [int(half) for half in HALVES]),
    "zero and one as decimals": ("is_test", [None, *map(float, HALVES[1:])]),
    "bytes": ("split", [b"train" if half else b"test" for half in HALVES]),
    "in a struct": ("meta", [{"id": 1, "split": "train" if half else "test"} for half in HALVES]),
    "a truth value in a struct": ("meta", [{"is_test": half} for half in HALVES]),
    "a truth value in a list": ("is_test", [[half] for half in HALVES]),
    "a number in a struct of splits": ("split", [{"fold": int(half)} for half in HALVES]),
    "in lists": ("tags", [["train", "x"] if half else ["test"] for half in HALVES]),
    "paths": ("file", [f"set/{'train' if half else 'test'}/{row}.png" for row, half in enumerate(HALVES)]),
    "paths of Windows": ("file", [f"D:\\{'train' if half else 'val'}\\{row}" for row, half in enumerate(HALVES)]),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_column_that_says_two_splits_is_one_line(tmp_path: Path, name: str, stream: bool) -> None:
    column, values = SPLITS[name]
    write(tmp_path / "train.parquet", image=PNGS, label=LABELS, **{column: values})
    write(tmp_path / "test.parquet", image=PNGS, label=LABELS)
    wanted = config(tmp_path, stream=stream)
    for ask in (load, lambda wanted, _: check(wanted)):
        with pytest.raises(
            ConfigError, match=rf"train\.parquet: its column '{column}[.\w]*' says the splits"
        ) as refusal:
            ask(wanted, 0)
        assert "write a file of each split" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_path_beside_the_bytes_of_an_image_says_its_split_too(tmp_path: Path) -> None:
    paths = [f"{'train' if half else 'test'}/{row}.png" for row, half in enumerate(HALVES)]
    images = [{"bytes": blob, "path": path} for blob, path in zip(PNGS, paths, strict=True)]
    write(tmp_path / "x.parquet", image=images, label=LABELS)
    with pytest.raises(ConfigError, match=r"its column 'image\.path' says the splits of rows \(test, train\)"):
        load(config(tmp_path), 0)


def test_a_column_that_says_another_split_in_each_file_is_one_line(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        write(tmp_path / f"{number}.parquet", image=PNGS, label=LABELS, split=[split] * ROWS)
    with pytest.raises(ConfigError, match=r"1\.parquet: its column 'split' says the splits of rows \(test, train\)"):
        load(config(tmp_path), 0)


def test_columns_that_say_one_split_or_none_are_left_alone(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(
            tmp_path / f"{split}.parquet",
            image=PNGS,
            label=LABELS,
            split=[split] * ROWS,
            kind=["bus" if half else "train" for half in HALVES],
            caption=[f"a {('test', 'train')[half]} {'x' * row}" for row, half in enumerate(HALVES)],
            test_score=[label / 10 for label in LABELS],
            test_date=pa.array(range(ROWS), pa.date32()),
            file=[f"{split}/{('cat', 'dog')[half]}/{row}.png" for row, half in enumerate(HALVES)],
            text=["and/or, cats/dogs"] * ROWS,
            meta=[{"split": split, "n": row} for row in range(ROWS)],
            eval=[{"correct": half} for half in HALVES],
            train_id=LABELS,
            width=[4] * ROWS,
        )
    assert right(load(config(tmp_path), 0))


WRONG = [9 - label for label in LABELS]
TAKEN: dict[str, tuple[dict[str, Any], str]] = {
    "mask first": ({"mask": OTHERS, "image": PNGS, "label": LABELS}, "column 'image', not from 'mask'"),
    "a picture in a struct": ({"thumbnail": OTHERS, "img": struct(PNGS), "label": LABELS}, "column 'img', not from"),
    "one column of any name": ({"glyph": PNGS, "label": LABELS}, ""),
    "one mask": ({"mask": PNGS, "label": LABELS}, ""),
    "fine beside label": ({"image": PNGS, "fine_label": WRONG, "label": LABELS}, "'label', not from 'fine_label'"),
    "coarse beside fine": ({"image": PNGS, "coarse_label": WRONG, "fine_label": LABELS}, "not from 'coarse_label'"),
    "coarse alone": ({"image": PNGS, "coarse_label": LABELS}, ""),
    "cls": ({"image": PNGS, "id": WRONG, "cls": LABELS}, ""),
    "y": ({"x": PNGS, "y": LABELS}, ""),
    "capitals": ({"Image": PNGS, "LABEL": LABELS}, ""),
}


@pytest.mark.parametrize("name", TAKEN)
def test_columns_that_are_taken_and_what_is_said_of_it(tmp_path: Path, name: str) -> None:
    columns, said = TAKEN[name]
    write(tmp_path / "train.parquet", **columns)
    write(tmp_path / "test.parquet", **columns)
    data = load(config(tmp_path), 0)
    assert right(data)
    assert said in " ".join(data.notes)
    assert bool(notes(data)) == bool(said)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two of no known name": (
        {"left": PNGS, "right": PNGS, "label": LABELS},
        "2 columns of bytes, left, right: say which",
    ),
    "no labels": ({"image": PNGS, "id": LABELS}, "--data.label-column NAME"),
    "pixels": ({"image": [[1, 2, 3]] * ROWS, "label": LABELS}, "no encoded images: write PNG or JPEG bytes"),
    "paths": ({"image": ["a.png"] * ROWS, "label": LABELS}, "no column of image bytes"),
    "pixels beside a thumbnail": ({"image": [[1]] * ROWS, "small": PNGS, "label": LABELS}, "'image' of"),
    "raw bytes": ({"image": [bytes(16)] * ROWS, "label": LABELS}, "row 0: an image cannot be read: its 16 bytes"),
    "only a path": ({"image": [{"bytes": None, "path": "a.png"}] * ROWS, "label": LABELS}, "no encoded images"),
    "a path in one row": (
        {"image": [*struct(PNGS[:-1]), {"bytes": None, "path": "a.png"}], "label": LABELS},
        "row 19: ",
    ),
    "a list of images": ({"image": [[{"bytes": PNGS[0]}]] * ROWS, "label": LABELS}, "no encoded images"),
    "a broken one": ({"image": [*PNGS[:13], b"x", *PNGS[14:]], "label": LABELS}, "x.parquet, row 13: an image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_need_a_guess_are_one_line(tmp_path: Path, name: str) -> None:
    columns, words = REFUSED[name]
    write(tmp_path / "x.parquet", **columns)
    with pytest.raises(ConfigError) as refusal:
        load(config(tmp_path), 0)
    assert words in str(refusal.value)


@pytest.mark.parametrize("stream", [False, True])
def test_columns_that_are_asked_for(tmp_path: Path, stream: bool) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", image=OTHERS, photo=PNGS, label=WRONG, kind=LABELS)
    wanted = config(tmp_path, label_column="kind", image_column="photo", stream=stream)
    data = load(wanted, 0)
    assert right(data)
    assert not notes(data)
    assert data.fingerprint != load(config(tmp_path, stream=stream), 0).fingerprint
    for name in ("label_column", "image_column"):
        with pytest.raises(ConfigError, match=rf"data\.{name} 'none' is no column of .*train\.parquet; columns: "):
            load(config(tmp_path, stream=stream, **{name: "none"}), 0)
    with pytest.raises(ConfigError, match=r"data\.image_column 'kind' of .* holds int64"):
        load(config(tmp_path, image_column="kind"), 0)


def test_columns_have_no_use_without_tables(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.label_column 'x' has no use"):
        DataConfig(label_column="x")
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(PNGS[0])
    with pytest.raises(ConfigError, match="holds images in folders, not columns"):
        load(config(tmp_path, label_column="x"), 0)


@pytest.mark.parametrize("stream", [False, True])
def test_shards_whose_schemas_differ(tmp_path: Path, stream: bool) -> None:
    write(tmp_path / "train-0.parquet", image=struct(PNGS), label=pa.array(LABELS, pa.int64()))
    write(tmp_path / "train-1.parquet", label=pa.array(LABELS, pa.int8()), more=WRONG, image=PNGS)
    write(tmp_path / "train-2.parquet", image=pa.array([], pa.null()), label=pa.array([], pa.null()))
    write(tmp_path / "test.parquet", more=["x"] * ROWS, image=PNGS, label=pa.array(LABELS, pa.uint16()))
    data = load(config(tmp_path, stream=stream), 0)
    assert right(data)
    assert len(data.train) + len(data.held_out) == 2 * ROWS
    if isinstance(data.train, Shards):
        images, labels, _ = StreamLoader(data.train, 10, 0, "t")(0, 0)
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long() % 10, labels)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("odd", ["train-1", "test"])
def test_shards_that_mean_other_things(tmp_path: Path, odd: str, stream: bool) -> None:
    for name in ("train-0", "train-1", "test"):
        write(tmp_path / f"{name}.parquet", image=PNGS, **{"target" if name == odd else "label": LABELS})
    with pytest.raises(ConfigError, match=rf"train-0.parquet has its labels in column 'label', .*{odd}.parquet in"):
        load(config(tmp_path, stream=stream), 0)
    names = [f"c{i}" for i in range(10)]
    for name in ("train-0", "train-1", "test"):
        shown = names[::-1] if name == odd else names
        write(tmp_path / f"{name}.parquet", {"label": shown}, image=PNGS, label=LABELS)
    with pytest.raises(ConfigError, match="name the classes of 'label' differently"):
        load(config(tmp_path, stream=stream), 0)


@pytest.mark.parametrize("stream", [False, True])
def test_names_of_classes(tmp_path: Path, stream: bool) -> None:
    names = [f"c{i}" for i in range(10)]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", {"kind": names}, image=PNGS, kind=LABELS)
    data = load(config(tmp_path, stream=stream), 0)
    assert right(data)
    assert data.classes == tuple(names)
    assert "classes 0 to 9 are c0, c1, c2" in data.notes[0]
    with pytest.raises(ConfigError, match=r"'kind' has 10 classes .c0, c1, c2, ....*, but data.classes is 12"):
        load(config(tmp_path, stream=stream, classes=12), 0)


def test_names_of_classes_in_a_map(tmp_path: Path) -> None:
    names = {str(i): f"c{i}" for i in (0, *range(9, 0, -1))}
    write(tmp_path / "x.parquet", {"kind": names}, image=PNGS, kind=LABELS)
    assert load(config(tmp_path), 0).classes == tuple(f"c{i}" for i in range(10))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_other_labels_are_other_data(tmp_path: Path, split: str, stream: bool) -> None:
    def fingerprint(labels: list[int]) -> str:
        write(tmp_path / f"{split}.parquet", image=OTHERS, label=labels)
        return load(config(tmp_path, stream=stream), 0).fingerprint

    for each in ("train", "test"):
        write(tmp_path / f"{each}.parquet", image=OTHERS, label=LABELS)
    first = fingerprint(LABELS)
    sizes = {(tmp_path / f"{split}.parquet").stat().st_size}
    for row in (0, 7, ROWS - 2):
        exchanged = list(LABELS)
        exchanged[row], exchanged[row + 1] = exchanged[row + 1], exchanged[row]
        assert fingerprint(exchanged) != first
        sizes.add((tmp_path / f"{split}.parquet").stat().st_size)
    assert len(sizes) < 4  # a size alone would not tell them
    assert fingerprint(LABELS) == first


def test_classes_without_images_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", image=PNGS, label=[1 + i % 2 for i in range(ROWS)])
    write(tmp_path / "test.parquet", image=PNGS, label=[i % 2 for i in range(ROWS)])
    lacking = ("1 of 3 classes have no training image: 0", "1 of 3 classes have no test image: 2")
    assert notes(load(config(tmp_path, classes=3), 0)) == lacking
    assert notes(load(config(tmp_path, classes=3, stream=True), 0)) == lacking[1:]


def test_test_images_that_are_trained_on_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", image=PNGS, label=LABELS)
    write(tmp_path / "test.parquet", image=[*PNGS[:3], *(png(20 + i) for i in range(17))], label=[0] * ROWS)
    said = "3 of 20 test images are training images too, pixel for pixel"
    assert said in load(config(tmp_path), 0).notes
    write(tmp_path / "test.parquet", image=[png(20 + i) for i in range(ROWS)], label=LABELS)
    assert not load(config(tmp_path), 0).notes


@pytest.mark.parametrize("stream", [False, True])
def test_colors_that_are_read_as_gray_are_noted(tmp_path: Path, stream: bool) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 10, 10)).save(buffer, "PNG")
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", image=[buffer.getvalue()] * ROWS, label=LABELS)
    said = "the first image has colors, and is read as gray: data.channels is 1"
    assert notes(load(config(tmp_path, stream=stream), 0)) == (said,)
    assert not notes(load(config(tmp_path, stream=stream, channels=3), 0))


def test_the_first_images_of_a_table_in_the_order_of_its_classes_are_noted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", image=[png(i // 2) for i in range(ROWS)], label=sorted(LABELS))
    assert not notes(load(config(tmp_path), 0))
    assert notes(load(config(tmp_path, limit=10), 0)) == tuple(
        f"5 of 10 classes have no {split} image: 5, 6, 7, 8, 9 (data.limit takes the first 10)"
        for split in ("training", "test")
    )


@pytest.mark.parametrize("stream", [False, True])
def test_labels_in_the_names_of_folders(tmp_path: Path, stream: bool) -> None:
    for split in ("train", "test"):
        for label in (0, 3):
            write(tmp_path / split / f"label={label}" / "0.parquet", image=[png(label)] * ROWS)
    assert right(load(config(tmp_path, stream=stream), 0))
    write(tmp_path / "train" / "label=cat" / "0.parquet", image=PNGS)
    with pytest.raises(ConfigError, match="label=cat says no integer"):
        load(config(tmp_path, stream=stream), 0)


@pytest.mark.parametrize("stream", [False, True])
def test_folders_above_the_data_say_no_label(tmp_path: Path, stream: bool) -> None:
    root = tmp_path / "label=3" / "split=test" / "set"
    for split in ("train", "test"):
        write(root / f"{split}.parquet", image=PNGS, target=LABELS)
    data = load(config(root, stream=stream), 0)
    assert right(data)
    assert not notes(data)
    assert right(load(config(root / "train.parquet"), 0))


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_and_a_column_that_say_other_labels(tmp_path: Path, stream: bool) -> None:
    for split in ("train", "test"):
        write(tmp_path / split / "label=3" / "0.parquet", image=[png(3)] * ROWS, label=[3] * ROWS, kind=[3] * ROWS)
    assert right(load(config(tmp_path, stream=stream), 0))
    write(tmp_path / "train" / "label=3" / "0.parquet", image=PNGS, label=[3, 5] * 10, kind=LABELS)
    with pytest.raises(ConfigError) as refusal:
        load(config(tmp_path, stream=stream), 0)
    words = "0.parquet, row 1: the column 'label' says 5, but the folder label=3; rename the folder, or name"
    assert words in str(refusal.value)
    with pytest.raises(ConfigError, match="row 1: the column 'label' says 5"):
        check(config(tmp_path))
    assert right(load(config(tmp_path, stream=stream, label_column="kind"), 0))


@pytest.mark.parametrize("stream", [False, True])
def test_a_number_of_classes_without_names(tmp_path: Path, stream: bool) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", {"kind": 10}, image=PNGS, kind=LABELS)
    data = load(config(tmp_path, stream=stream), 0)
    assert right(data)
    assert (data.classes, notes(data)) == ((), ())
    write(tmp_path / "test.parquet", {"kind": float("inf")}, image=PNGS, label=LABELS)
    with pytest.raises(ConfigError, match="in column 'kind'"):
        load(config(tmp_path, stream=stream), 0)
    write(tmp_path / "test.parquet", {"kind": 12}, image=PNGS, kind=LABELS)
    with pytest.raises(ConfigError, match=r"test\.parquet: the column 'kind' has 12 classes, but data\.classes is 10"):
        load(config(tmp_path, stream=stream), 0)


def test_a_class_whose_name_breaks_the_line_is_quoted(tmp_path: Path) -> None:
    names = ["a\nb", *(f"c{i}" for i in range(9))]
    write(tmp_path / "x.parquet", {"label": names}, image=PNGS, label=LABELS)
    data = load(config(tmp_path), 0)
    assert data.classes == tuple(names)
    assert data.notes[0].startswith(r"classes 0 to 9 are 'a\nb', c0, c1")
    with pytest.raises(ConfigError, match=r"10 classes \('a\\nb', c0, c1, \.\.\.\)"):
        load(config(tmp_path, classes=12), 0)


def test_a_folder_that_holds_a_label_says_no_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in (0, 1):
            write(tmp_path / split / f"is_test={label}" / "0.parquet", image=[png(label)] * ROWS)
    assert right(load(config(tmp_path, label_column="is_test"), 0))
    with pytest.raises(ConfigError, match="'is_test=0' may say a split"):
        load(config(tmp_path), 0)


def everything(wanted: DataConfig) -> list[Any]:
    """All images and labels that a run with ``wanted`` meets, in order."""
    data = load(wanted, 0)
    if not isinstance(data.train, Shards):
        return [tensor for part in (data.train, data.held_out, data.test) for tensor in (part.images, part.labels)]
    loader = StreamLoader(data.train, 5, 0, "t")
    batches = [loader(0, step)[:2] for step in range(loader.steps_per_epoch)]
    loader._pool.shutdown()
    parts = [(part.images, part.labels) for part in (data.held_out, data.test)]
    return [tensor for part in (*batches, *parts) for tensor in part]


@pytest.mark.parametrize("stream", [False, True])
def test_no_damage_is_met_in_silence_or_with_a_traceback(tmp_path: Path, stream: bool) -> None:
    table = pa.table({"image": struct(PNGS), "label": LABELS})
    for split in ("train", "test"):
        file = tmp_path / f"{split}.parquet"
        pq.write_table(table, file, row_group_size=5, write_page_checksum=True)
    wanted = config(tmp_path, stream=stream)
    whole, expected, refused = (tmp_path / "train.parquet").read_bytes(), everything(wanted), list[str]()
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(whole), 50).tolist():
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "train.parquet").write_bytes(damaged)
        try:
            assert all(map(torch.equal, everything(wanted), expected)), f"byte {place}"
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) > 15
    assert all("train.parquet" in line and "\n" not in line for line in refused)
