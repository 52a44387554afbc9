"""What the smoke runs compute, to the bit, and what the command line says: observed, and kept beside this file.

    python -m tests.golden.write [NAME ...]

writes the golden files of these runs again, or all of them. It uses nothing but the command line and the files that a
run leaves, so that it outlives any move of modules. Say in the commit why a golden file changes.

``torch-VERSION/NAME.json`` holds weights (a SHA-256 of each stage's), stage keys, held-out accuracies and result rows
of a run on one thread of a CPU. ``commands/`` holds the settings of the presets in PRESETS and the help of JOBS.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from infra.photo_shards import write_photos
from tests.jobs import ROOT, run_job

HERE = Path(__file__).parent
FOLDER = HERE / f"torch-{torch.__version__.partition('+')[0]}"
COMMANDS = HERE / "commands"
COMMAND = "python -m tests.golden.write"
QUIET = ("--launcher", "local", "--tracking.no-enabled", "--scaling.device", "cpu", "--scaling.threads", "1")
SHORT = ("--pretrain.epochs", "1", "--dir.epochs", "1", "--target.epochs", "1", "--evaluation.images", "8")
JOINT = ("--dir.joint", "--pretrain.epochs", "0", "--dir.crafting-masks", "fresh", "--dir.mse-weight", "0.1")
COMPARED = ("apegan", "apegan_a", "hgd", "hgd_a", "nrp", "nrp_a", "jatp", "menet", "menet_a", "identity", "finetune")
COMPARED += ("ebm",)
PRESETS = (
    *("digits", "cifar10", "cifar10_fast", "cifar10_small", "cifar10_joint", "cifar10_ebm_short", "svhn"),
    *("cifar10_joint_trades", "cifar10_joint_mart"),
    *(f"{family}_{name}" for family in ("digits", "cifar10") for name in COMPARED),
)
JOBS = ("train", "evaluate", "tune", "benchmark", "doctor", "reproduce")
FIRST = {"reproduce": ("table1",)}
"""Words before the preset, by job."""


LATER_COLUMNS: dict[str, Any] = {"crafting": "fp32", "predictions": "fp32", "marks": [], "sample": None}
"""Columns younger than the golden files, each with the value that rows without it have."""


@dataclass(frozen=True)
class Golden:
    """A run of jobs/train.py, and the suites by which its defense is evaluated once more."""

    words: tuple[str, ...]
    cifar10: bool = False
    """Whether it reads images of the real CIFAR-10."""
    shards: bool = False
    """Whether it streams the shards that infra/photo_shards.py writes."""
    suites: tuple[str, ...] = ()

    @property
    def joint(self) -> bool:
        return any("joint" in word for word in self.words)


RUNS = {
    "digits_smoke": Golden(("digits_smoke",), suites=("paper", "rigorous")),
    "digits_smoke_joint": Golden(("digits_smoke", *JOINT)),
    "imagenet_smoke": Golden(
        ("imagenet_smoke", *SHORT, "--attack.steps", "1", "--dir.perturb-steps", "1"), shards=True
    ),
    "cifar10_smoke": Golden(("cifar10_smoke", *SHORT, "--data.limit", "20"), cifar10=True),
    "cifar10_joint_smoke": Golden(
        ("cifar10_joint_smoke", "--dir.epochs", "1", "--evaluation.images", "8", "--data.limit", "20"), cifar10=True
    ),
}


def find_data() -> Path | None:
    """The real CIFAR-10 as parquet: in the folder DIRCLUSTER_DATA, or in ../shared/data beside the checkout."""
    folder = Path(os.environ.get("DIRCLUSTER_DATA", ROOT.parent / "shared" / "data")) / "cifar10"
    return folder if folder.is_dir() else None


def write_few(source: Path, folder: Path, rows: int = 64) -> None:
    """The first images of both splits of ``source`` as parquet in ``folder``: decoding all of them takes long."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    for split in ("train", "test"):
        first = pq.ParquetFile(min(source.glob(f"{split}*.parquet")))
        batch = next(first.iter_batches(batch_size=rows))
        pq.write_table(pa.Table.from_batches([batch]), folder / f"{split}.parquet")


def arithmetic() -> dict[str, str]:
    """What bits depend on besides the version of torch: the CPU's instruction set, and what it makes of one sample."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        draws = torch.Generator().manual_seed(0)
        x = torch.rand(8, 16, 12, 12, generator=draws).requires_grad_(True)
        made = F.conv2d(x, torch.rand(32, 16, 3, 3, generator=draws), padding=1).flatten(2).transpose(1, 2)
        made = F.gelu(F.layer_norm(made @ torch.rand(32, 48, generator=draws), (48,)))
        split = made.unflatten(2, (4, 12)).transpose(1, 2)
        out = F.scaled_dot_product_attention(split, split, split).logsumexp(dim=-1)
        out.square().mean().backward()
    finally:
        torch.set_num_threads(threads)
    assert x.grad is not None
    found = sha256({"out": out.detach(), "gradient": x.grad})
    return {"capability": torch.backends.cpu.get_cpu_capability(), "sample": found[:16]}


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def job(name: str, *words: str, folder: Path) -> str:
    """What jobs/NAME.py prints when it is called with ``words`` in ``folder``."""
    done = run_job(name, *words, folder=folder, env={"COLUMNS": "100", "NO_COLOR": "1"})
    if done.code:
        raise RuntimeError(f"jobs/{name}.py {' '.join(words)} ended with {done.code}: {done.err.strip()}")
    return done.out


def observe(name: str, folder: Path) -> dict[str, Any]:
    """The run ``name``, done in the empty ``folder``: what its golden file must hold."""
    golden, words = RUNS[name], [*QUIET, "--storage.uri", "runs"]
    if golden.cifar10:
        source = find_data()
        assert source is not None
        write_few(source, folder / "few")
        words += ["--data.uri", "few"]
    if golden.shards:
        write_photos(folder / "shards")
    job("train", *golden.words, *words, "--summary", "train.json", folder=folder)
    trained = json.loads((folder / "train.json").read_text())
    weights: dict[str, dict[str, str]] = {}
    keys: dict[str, str] = {}
    for final in sorted((folder / "runs").glob("*/final")):
        stage = final.parent.name.partition("-")[0]
        keys[stage] = json.loads((final / "manifest.json").read_text())["config"]
        assert final.parent.name == f"{stage}-{keys[stage][:12]}"
        weights[stage] = {file.stem: sha256(load_file(file)) for file in sorted(final.glob("*.safetensors"))}
    found = {
        "keys": keys,
        "weights": weights,
        "selection": trained["selection"],
        "results": as_written(trained["results"]),
    }
    for suite in golden.suites:
        few = ("--suite", suite, "--evaluation.images", "4", "--evaluation.queries", "10")
        few += ("--defense", trained["checkpoint"], "--summary", f"{suite}.json")
        more = ("--no-verdict",) if suite == "paper" else ()  # one verdict is enough
        job("evaluate", *golden.words, *words, *few, *more, folder=folder)
        judged = json.loads((folder / f"{suite}.json").read_text())
        found |= {suite: as_written(judged["rows"]), f"{suite}_verdict": judged["verdict"]}
    return found


def as_written(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the columns of LATER_COLUMNS that have the value given there."""
    absent = object()
    return [{k: v for k, v in row.items() if v != LATER_COLUMNS.get(k, absent)} for row in rows]


def keys_without_weights(name: str, found: Mapping[str, Any]) -> dict[str, str]:
    """The keys that depend on no earlier stage's weights, and so on no machine's arithmetic."""
    return {stage: key for stage, key in found["keys"].items() if RUNS[name].joint or stage == "target"}


def texts(folder: Path) -> dict[str, str]:
    """The settings of PRESETS, and the help of every one of JOBS: one in full, of the others what differs."""
    made = {}
    for preset in [*PRESETS, *(f"{name}_smoke" for name in PRESETS), "imagenet_smoke"]:
        made[f"{preset}.yaml"] = job("train", preset, "--print-config", folder=folder)
    whole = plain(job("train", "digits_smoke", "--help", folder=folder))
    made["train_digits_smoke_help.txt"] = whole
    for name, preset in (("train", "imagenet_smoke"), *((name, "digits_smoke") for name in JOBS[1:])):
        other = plain(job(name, *FIRST.get(name, ()), preset, "--help", folder=folder))
        changed = unified_diff(
            whole.splitlines(), other.splitlines(), "train digits_smoke", f"{name} {preset}", "", "", 0
        )
        made[f"{name}_{preset}_help.diff"] = "".join(f"{line.rstrip()}\n" for line in changed)
    return made


def plain(text: str) -> str:
    """``text`` without where the checkout lies, and without spaces at the ends of its lines."""
    lines = text.replace(f"{ROOT}/", "").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def to_json(found: Mapping[str, Any]) -> str:
    """JSON in which a row of a table is a line, so that a difference can be read."""
    parts = []
    for name, value in found.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f' "{name}": [\n  {rows}\n ]')
        elif isinstance(value, dict):
            rows = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in value.items())
            parts.append(f' "{name}": {{\n  {rows}\n }}')
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(names: list[str]) -> int:
    """Write the golden files of ``names``, or of all runs and commands; -> exit code."""
    unknown = sorted(set(names) - {*RUNS, "commands"})
    if unknown:
        print(f"error: there is no run {unknown[0]}; there are {', '.join(RUNS)}, commands", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for name in names or [*RUNS, "commands"]:
        with tempfile.TemporaryDirectory() as folder:
            if name == "commands":
                COMMANDS.mkdir(exist_ok=True)
                for file, text in texts(Path(folder)).items():
                    (COMMANDS / file).write_text(text, encoding="utf-8")
            elif RUNS[name].cifar10 and find_data() is None:
                print(f"{name}: left as it is, there is no cifar10; set DIRCLUSTER_DATA to the folder that holds it")
                continue
            else:
                FOLDER.mkdir(exist_ok=True)
                found = {"arithmetic": arithmetic(), **observe(name, Path(folder))}
                (FOLDER / f"{name}.json").write_text(to_json(found))
        print(f"{name}: written", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
