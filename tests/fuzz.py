"""make fuzz: random command lines and damaged files end in an answer or in one line, never in a traceback or a hang.

python -m tests.fuzz [--lines N] [--files N] [--seed N]: -> exit code 1 where one does not. Nothing is trained: command
lines are parsed and checked as a job does before it starts anything; files are read as a job reads them. What holds
checksums (parquet, PNG, checkpoints, files of torch.save) must also never come back changed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from dircluster import cli
from dircluster.cluster import preflight
from dircluster.cluster.paths import with_absolute_paths
from dircluster.config import ConfigError, DataConfig, RunConfig, flatten, to_dict, with_values
from dircluster.data.sources import load
from dircluster.data.stream import StreamLoader
from dircluster.defenses.table import find_defense
from dircluster.evaluation.report_images import read_report
from dircluster.presets import PRESETS, preset
from dircluster.training import checkpoint
from dircluster.training.export import load_defense_folder, load_target
from dircluster.training.forecast import forecast, from_summary
from dircluster.training.stages import trained_stages

LIMIT = 20
"""Seconds after which a command line or a file counts as a hang."""
JOBS: tuple[type[cli.Job], ...] = (cli.TrainJob, cli.EvaluateJob, cli.TuneJob, cli.BenchmarkJob, cli.DoctorJob)
VALUES = (
    *("", "0", "1", "-1", "2", "15", "15.0", "-0.0", "0.5", "8/255", "1/0", "0/0", "1e-3", "1e18", "1e400", "-1e400"),
    *("nan", "inf", "None", "null", "true", "False", "on", "no", "08", "0x10", "1_000", "1:4", "4:1", "1:", "100000"),
    *("2147483647", "2147483648", "9" * 30, "digits", "cifar10", "/", ".", "~", "~nobody/x", "/nowhere/at/all", "a b"),
    *("s3://", "s3:///x", "s3://b?c#d", "http://u:p@h", "file:///tmp", "timm:", "timm:resnet18", "models:/x@y", "a:b"),
    *("os:getcwd", "../..", "%41", "a'b", 'a"b', "ä€😀", "\t", "a\nb", "\x00", "--seed", "-", "--", "[1, 2]", "{a: b}"),
)
"""What people type, and what nobody should."""


class Hang(Exception):
    pass


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(work: Callable[[], Any]) -> tuple[str, Any]:
    """How ``work`` ended, in a word, and what it gave, or why it is a fault."""
    try:
        with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "taken", work()
    except ConfigError as error:
        return ("refused", str(error)) if "\n" not in str(error) else ("SEVERAL LINES", str(error))
    except SystemExit as end:
        return ("taken", None) if end.code in (0, None) else ("EXIT", end.code)
    except Hang:
        return "HANG", f"more than {LIMIT} s"
    except BaseException:
        return "TRACEBACK", traceback.format_exc()


def command_line(chance: random.Random) -> tuple[type[cli.Job], list[str]]:
    """A job and its words: a preset, some flags of it, and values of all kinds."""
    kind, name = chance.choice(JOBS), chance.choice([*PRESETS, *PRESETS, "nobody", "", "a:b"])
    known = flatten(to_dict(preset(name if name in PRESETS else "digits")))
    words = [name] if name else []
    for _ in range(chance.randint(0, 4)):
        field = chance.choice([*known, "config", "defense", "launcher", "summary", "suite", "space", "points", "steps"])
        flag = f"--{field.replace('_', '-') if chance.random() < 0.8 else field}"
        if chance.random() < 0.05:
            flag = flag[: chance.randint(2, len(flag))]
        value = str(known.get(field, "x")) if chance.random() < 0.3 else chance.choice(VALUES)
        words += {0: [f"{flag}={value}"], 1: [flag]}.get(chance.randint(0, 9), [flag, value])
    if chance.random() < 0.05:
        chance.shuffle(words)
    return kind, words


def parsed(kind: type[cli.Job], words: list[str]) -> RunConfig:
    """What a job does with its words before it starts anything."""
    job = cli.parse(kind, words)
    preflight.check(with_absolute_paths(job.run), on_ray=False)
    return job.run


def keeps(run: RunConfig, kind: type[cli.Job], words: list[str], folder: Path) -> None:
    """Raise where the settings that a command line gives are others once they are printed and read."""
    file = folder / "all.yaml"
    file.write_text(cli.to_yaml(run))
    first = [words[0]] if words and not words[0].startswith("-") else []
    again = cli.parse(kind, [*first, "--config", str(file)]).run
    assert again == run, f"{again} is not {run}"


def fuzz_lines(count: int, seed: int, folder: Path) -> list[str]:
    chance, ends, faults = random.Random(seed), collections.Counter[str](), list[str]()
    for _ in range(count):
        kind, words = command_line(chance)
        end, found = outcome(lambda kind=kind, words=words: parsed(kind, words))
        if end == "taken" and found is not None:
            end, found = outcome(lambda: keeps(found, kind, words, folder))  # noqa: B023 - called at once
        ends[end] += 1
        if end not in ("taken", "refused"):
            faults.append(f"{kind.__name__} {words}: {end} {found}")
    print(f"{'command lines':14} {show(ends)}")
    return faults


@dataclass(frozen=True)
class Kind:
    """A kind of file: how one is made in a folder, and what is read of it."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    sealed: bool = False
    """It holds checksums: no change goes unnoticed."""


def pictures(form: str, count: int = 40) -> list[bytes]:
    made = []
    for number in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(file, form)
        made.append(file.getvalue())
    return made


def make_table(folder: Path) -> Path:
    file = folder / "train-0.parquet"
    table = pa.table({"image": pictures("PNG"), "label": [i % 10 for i in range(40)]})
    pq.write_table(table, file, write_page_checksum=True, row_group_size=10)
    shutil.copy(file, folder / "test-0.parquet")
    return file


def make_images(form: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for number, blob in enumerate(pictures(form, 20)):
            place = folder / "train" / str(number % 10)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.{form.lower()}").write_bytes(blob)
        return folder / "train" / "3" / f"3.{form.lower()}"

    return make


def data_of(uri: Path, stream: bool = False) -> DataConfig:
    return DataConfig("custom", str(uri), stream=stream, held_out=0.25)


def read_data(folder: Path) -> str:
    found = load(data_of(folder), 0)
    return f"{found.fingerprint} {found.train.labels.tolist()}"  # type: ignore[union-attr]


def read_stream(folder: Path) -> str:
    found, kept = load(data_of(folder, stream=True), 0), hashlib.sha256()
    batches = StreamLoader(found.train, 10, 0, "fuzz")  # type: ignore[arg-type]
    for step in range(batches.steps_per_epoch):
        for part in batches(0, step)[:2]:
            kept.update(part.numpy().tobytes())
    for split in (found.held_out, found.test):
        kept.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
    return kept.hexdigest()


SMOKE = preset("digits_smoke")


def make_defense(folder: Path) -> Path:
    defense = find_defense(SMOKE.defense)
    names = (*defense.modules(SMOKE), "classifier")
    tensors = {name: defense.build(SMOKE, name).state_dict() for name in names}
    checkpoint.write(folder, tensors, {"stage": "dir", "defense": defense.to_plain(SMOKE)}, "key")
    return folder


def hash_of(network: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values())).hexdigest()


def read_defense(folder: Path) -> str:
    return hash_of(load_defense_folder(folder))


def make_target(folder: Path) -> Path:
    file = folder / "h.safetensors"
    save_file(find_defense(SMOKE.defense).build(SMOKE, "classifier").state_dict(), file)
    return file


def make_saved(folder: Path) -> Path:
    file = folder / "h.pt"
    torch.save(find_defense(SMOKE.defense).build(SMOKE, "classifier").state_dict(), file)
    return file


def read_target(file: Path) -> str:
    return hash_of(load_target(with_values(SMOKE, {"target.uri": str(file)})))


def make_settings(folder: Path) -> Path:
    file = folder / "mine.yaml"
    file.write_text(cli.to_yaml(SMOKE))
    return file


def make_calibration(folder: Path) -> Path:
    pace = {"operations_per_second": 1e9, "images": 16, "memory": 1 << 20}
    names = [*(stage.name for stage in trained_stages(SMOKE)), "evaluation"]
    paces = dict.fromkeys(names, pace)
    file = folder / "calibration.json"
    file.write_text(json.dumps({"calibration": {"device": "CPU", "paces": paces}}))
    return file


def make_report(folder: Path) -> Path:
    file = folder / "report.json"
    images = {"data": "d", "width": 1, "labels": [1], "numbers": [0], "rows": []}
    file.write_text(json.dumps({"images": images}))
    return file


KINDS: dict[str, Kind] = {
    "parquet": Kind(make_table, lambda file: read_data(file.parent), sealed=True),
    "streamed shard": Kind(make_table, lambda file: read_stream(file.parent), sealed=True),
    "png": Kind(make_images("PNG"), lambda file: read_data(file.parents[2]), sealed=True),
    **{
        form.lower(): Kind(make_images(form), lambda file: read_data(file.parents[2]))
        for form in ("JPEG", "GIF", "TIFF", "BMP", "WEBP")
    },
    "checkpoint": Kind(make_defense, read_defense, sealed=True),
    "safetensors": Kind(make_target, lambda file: read_target(file) and None),
    "pt": Kind(make_saved, read_target, sealed=True),
    "yaml": Kind(make_settings, lambda file: parsed(cli.TrainJob, ["digits_smoke", "--config", str(file)]) and None),
    "calibration": Kind(make_calibration, lambda file: forecast(SMOKE, from_summary(file), 90, 10, 40) and None),
    "report": Kind(make_report, lambda file: read_report(file) and None),
}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content of a file with bits that flipped, a part that is missing, zero, doubled or noise, or nothing."""
    at = chance.randrange(max(1, len(content)))
    end = min(len(content), at + chance.choice((1, 4, 100, 5000)))
    noise = bytes(chance.randrange(256) for _ in range(end - at))
    flipped = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 3, 20))):
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    ways = (content[:at], content[:at] + content[end:], content[:at] + bytes(end - at) + content[end:])
    ways += (content[:end] + content[at:], content[:at] + noise + content[end:], b"", b"[" * 100_000)
    return chance.choice((bytes(flipped), bytes(flipped), bytes(flipped), *ways))


def fuzz_files(name: str, count: int, seed: int, folder: Path) -> list[str]:
    kind, chance, ends, faults = KINDS[name], random.Random(seed), collections.Counter[str](), list[str]()
    folder.mkdir()
    made = kind.make(folder)
    sound = {file: file.read_bytes() for file in ([made] if made.is_file() else sorted(made.iterdir()))}
    right = kind.read(made)
    for _ in range(count):
        file = chance.choice(list(sound))
        file.write_bytes(damaged(sound[file], chance))
        changed = file.read_bytes() != sound[file]
        end, found = outcome(lambda: kind.read(made))
        if end == "taken" and kind.sealed and changed and found != right:
            end, found = "CHANGED", file.name
        ends[end] += 1
        if end not in ("taken", "refused"):
            kept = Path(tempfile.gettempdir()) / f"fuzz-{name.replace(' ', '-')}-{len(faults)}-{file.name}"
            shutil.copy(file, kept)
            faults.append(f"{name} {kept}: {end} {found}")
        file.write_bytes(sound[file])
    print(f"{name:14} {show(ends)}", flush=True)
    return faults


def show(ends: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__)
    for flag, usual in (("--lines", 1000), ("--files", 200), ("--seed", 0)):
        given.add_argument(flag, type=int, default=usual)
    given.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    asked, began, faults = given.parse_args(), time.monotonic(), list[str]()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        os.environ.pop("RAY_ADDRESS", None)
        if asked.lines:
            faults += fuzz_lines(asked.lines, asked.seed, Path(name))
        for kind in asked.kinds if asked.files else ():
            faults += fuzz_files(kind, asked.files, asked.seed, Path(name) / kind.replace(" ", "-"))
    print(f"{len(faults)} faults in {time.monotonic() - began:.0f} s, seed {asked.seed}")
    for fault in faults:
        print(f"\n{fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
