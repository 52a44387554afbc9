"""--launcher local: one process or torchrun, without Ray, MLflow and s3fs, interrupted and resumed, misused."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from dircluster.cores import cores
from dircluster.defenses.table import find_defense
from dircluster.presets import preset
from tests.conftest import Trained
from tests.jobs import environment, run_job
from tests.pictures import png

Train = Callable[..., Any]
LOCAL = ("--launcher", "local", "--tracking.no-enabled")
TWENTY = ("--target.epochs", "5", "--pretrain.epochs", "5", "--dir.epochs", "5", "--scaling.device", "cpu")


def calibrated(file: Path) -> None:
    """Write what a --dry-run of DIR might have measured."""
    pace = {"operations_per_second": 1e9, "images": 1, "memory": 2**29}
    names = ["target", "pretrain", "dir", "evaluation"]
    file.write_text(json.dumps({"calibration": {"device": "a CPU", "paces": dict.fromkeys(names, pace)}}))


def losses(out: str) -> dict[tuple[str, str], str]:
    """The losses that were printed, by stage and step; how many are depends on the time that was taken."""
    lines = [line.split("  ") for line in out.splitlines() if "  step " in line]
    return {(parts[0], parts[2]): parts[3] for parts in lines}


def must_agree(one: dict[tuple[str, str], str], other: dict[tuple[str, str], str]) -> None:
    common = one.keys() & other.keys()
    assert len(common) >= 6  # first and last of three stages
    assert {at: one[at] for at in common} == {at: other[at] for at in common}


def weights(folder: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in Path(folder).glob("*.safetensors")}


TRAINED = ((2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp"))
RESUMED = ((1, "ddp"), (4, "fsdp"))
"""Who trains, and who resumes what two sharding workers saved."""


@pytest.mark.slow  # CI compares the bits of two workers and one in tests/fault
def test_workers_compute_the_bits_of_one_replicated_or_sharded(train: Train, tmp_path: Path) -> None:
    """20 steps a stage by DDP and FSDP, against one worker: losses, results and final weights."""

    def run(workers: int, strategy: str, storage: Path) -> Any:
        words = (*LOCAL, *TWENTY, "--storage.checkpoint-every", "8", "--parallel.strategy", strategy)
        words += ("--target.ema", "None")  # fsdp keeps no mean of weights
        done = train("digits_smoke", *words, "--storage.uri", str(storage), workers=workers)
        assert done.code == 0, done.err
        return done

    one = run(1, "ddp", tmp_path / "one")
    expected = weights(one.summary["checkpoint"])
    for workers, strategy in TRAINED:
        done = run(workers, strategy, tmp_path / f"{strategy}{workers}")
        must_agree(losses(done.out), losses(one.out))
        assert weights(done.summary["checkpoint"]) == expected, (workers, strategy)
        assert done.summary["results"] == one.summary["results"]
    for workers, strategy in RESUMED:
        storage = tmp_path / f"again{workers}"
        shutil.copytree(tmp_path / "fsdp2", storage)
        (stage,) = storage.glob("dir-*")
        shutil.rmtree(stage / "final")
        shutil.rmtree(stage / "step-00000020")
        done = run(workers, strategy, storage)
        assert "dir: resuming at step 16 of 20" in done.out
        assert weights(done.summary["checkpoint"]) == expected, (workers, strategy)


def test_a_sharded_model_crafts_without_gathering_gradients(root: Path) -> None:
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script += [str(root / "tests/integration/sharded_step.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=400, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["while crafting"] == 0
    assert found["in the backward pass"] == found["layers"] > 2
    assert found["share of the weights on a worker"] == pytest.approx(0.5, abs=0.02)
    assert found["sharding changes the gradient by"] == 0.0
    assert found["recomputing changes the gradient by"] == 0.0
    assert found["validating changes the gradient by"] == 0.0
    for strategy in ("ddp", "fsdp"):  # shards are padded to equal parts
        assert found[f"sent to predicted, {strategy}"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
def test_batch_statistics_are_those_of_the_global_batch(train: Train, tmp_path: Path, real_data: Path) -> None:
    """A ResNet with batch normalization, on real images: one worker and two agree on what its statistics are."""
    found = {}
    for workers in (1, 2):
        words = ("svhn_smoke", *LOCAL, "--data.uri", str(real_data / "svhn"), "--data.limit", "40")
        words += ("--training.microbatch", "None", "--target.epochs", "1", "--target.objective", "natural")
        words += ("--scaling.device", "cpu", "--pretrain.epochs", "0", "--dir.epochs", "1")
        done = train(*words, "--storage.uri", str(tmp_path / f"runs{workers}"), workers=workers)
        assert done.code == 0, done.err
        folder = next((tmp_path / f"runs{workers}").glob("target-*/final"))
        found[workers] = load_file(folder / "classifier.safetensors")
    names = [name for name in found[1] if name.endswith("running_mean")]
    assert names
    for name in names:
        torch.testing.assert_close(found[2][name], found[1][name], rtol=1e-3, atol=1e-4)


def test_it_runs_with_ray_mlflow_and_s3fs_not_installed(root: Path, tmp_path: Path) -> None:
    blocker = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'ray', 'mlflow', 's3fs', 'boto3'}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util\n"
        "whole = importlib.util.find_spec\n"
        "def find_spec(name, package=None):\n"
        "    try: return whole(name, package)\n"
        "    except ModuleNotFoundError: return None\n"
        "importlib.util.find_spec = find_spec\n"
    )
    job = (
        "from dircluster.cluster.commands.train import main\n"
        "assert main(['digits_smoke', '--launcher', 'local', '--summary', 's.json']) == 0\n"
        "import dircluster, json, torch\n"
        "defense = dircluster.load_defense(json.load(open('s.json'))['checkpoint'])\n"
        "assert defense(torch.rand(2, 1, 8, 8)).shape == (2, 10)\n"
        "assert not {'ray', 'mlflow', 's3fs', 'boto3'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocker + job], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "MLflow is not installed: no record is kept" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_commits_a_checkpoint_and_the_same_command_resumes(
    train: Train, start: Any, tmp_path: Path, number: int, code: int
) -> None:
    words = ("digits_smoke", *LOCAL, "--dir.epochs", "40", "--storage.uri", str(tmp_path / "broken"))
    process = start(*words)
    for line in process.stdout:
        if line.startswith("dir  "):
            break
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    assert time.monotonic() - began < 120
    assert "resume with: python jobs/train.py digits_smoke" in out
    resumed = train(*words)
    assert resumed.code == 0, resumed.err
    assert "dir: resuming at step" in resumed.out
    whole = train(*words[:-1], str(tmp_path / "whole"))
    assert weights(resumed.summary["checkpoint"]) == weights(whole.summary["checkpoint"])


def test_the_summary(train: Train) -> None:
    done = train("digits_smoke", *LOCAL, "--seed", "3")
    summary = done.summary
    assert done.code == 0, done.err
    assert (summary["preset"], summary["seed"], summary["run_id"]) == ("digits_smoke", 3, None)
    assert summary["seconds"] > 0
    assert len(summary["commit"]) >= 7
    assert (Path(summary["checkpoint"]) / "denoiser.safetensors").is_file()
    for row in summary["results"]:
        assert {"defense", "attack", "randomness", "correct", "total", "interval"} <= set(row)
        assert row["accuracy"] == row["correct"] / row["judged"]
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    assert done.out.splitlines()[0].startswith("digits_smoke, seed 3, tracking.enabled False: reusing and resuming")
    again = train("digits_smoke", *LOCAL, "--seed", "3", "--fresh")
    assert again.out.splitlines()[0].startswith("digits_smoke, seed 3, tracking.enabled False: starting again")
    assert again.summary["checkpoint"] != summary["checkpoint"]
    assert weights(again.summary["checkpoint"]) == weights(summary["checkpoint"])


def test_bad_input_is_one_line_and_exit_2(train: Train, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.folder / "runs", tmp_path / "runs")
    final = next((tmp_path / "runs").glob("dir-*/final"))
    save_file({"x": torch.zeros(2, 2)}, tmp_path / "foreign.safetensors")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    target = next((tmp_path / "runs").glob("target-*/final"))
    manifest = json.loads((target / "manifest.json").read_text())
    cases = {
        "unknown preset 'nope'": ["nope"],
        "Unrecognized options: --nope": ["digits", "--nope", "1"],
        "--model.encoder-depth": ["digits", "--model.encoder-depth", "deep"],
        "masking.ratio must lie in (0, 1), got 50; did you mean 0.5?": ["digits", "--masking.ratio", "50"],
        "model.patch must divide data.height 32, got 3": ["cifar10", "--model.patch", "3"],
        "leaves patches unseen": ["digits", "--masking.count", "1"],
        "attack.epsilon must lie in (0, 1), got 8": ["digits", "--attack.epsilon", "8"],
        "does not exist": ["digits_smoke", *LOCAL, "--data.uri", "nowhere"],
        "neither parquet files nor images": ["digits_smoke", *LOCAL, "--data.uri", "empty"],
        "does not fit the model": ["digits_smoke", *LOCAL, "--target.uri", "foreign.safetensors"],
        "target.uri": ["digits_smoke", *LOCAL, "--target.uri", "absent.safetensors"],
        "password": ["digits", "--storage.uri", "s3://me:CANARY@bucket/runs"],
        "scaling.workers must be a number": ["digits", "--scaling.workers", "4:2"],
        "data.stream needs": ["digits", "--data.stream"],
        "cannot be written": ["digits_smoke", *LOCAL, "--storage.uri", "file/runs"],
        "its folder does not exist": ["digits_smoke", *LOCAL, "--summary", "absent/s.json"],
        "--summary empty cannot be written: it is a folder": ["digits_smoke", *LOCAL, "--summary", "empty"],
        "is more than the": ["digits_smoke", *LOCAL, "--training.batch-size", "1024", "--training.microbatch", "8"],
    }
    for message, words in cases.items():
        done = train(*words, here=True)
        assert done.code == 2, words
        (line,) = done.error
        assert message in line, words
    (target / "manifest.json").write_text(json.dumps({**manifest, "config": "0" * 64}))
    (target / "COMMIT").write_text(hashlib.sha256((target / "manifest.json").read_bytes()).hexdigest())
    other = train("digits_smoke", *LOCAL)
    assert (other.code, len(other.error)) == (2, 1)
    assert "belongs to another config" in other.error[0]
    file = final / "denoiser.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    cut = train("digits_smoke", *LOCAL, "--target.uri", str(final))
    assert (cut.code, len(cut.error)) == (2, 1)
    assert "damaged" in cut.error[0]


def test_dry_run_tells_and_makes_nothing_but_its_forecast(train: Train, tmp_path: Path) -> None:
    most, workers = min(cores(), 64), ("--scaling.workers", "1:64", "--scaling.device", "cpu")
    done = train("digits", "--dry-run", *workers, here=True)
    assert done.code == 0, done.err
    assert f"launcher ray, {most} worker(s)" in done.out
    assert f"{cores() // most} threads" in done.out  # each worker's
    assert "87,172 parameters, 0.004 GFLOP an image" in done.out
    assert "foretold from" in done.out
    (made,) = (file for file in (tmp_path / "runs").rglob("*") if file.is_file())
    assert made.parent == tmp_path / "runs" / "forecasts"


def test_dry_run_reads_what_is_given(train: Train, tmp_path: Path) -> None:
    network: Any = find_defense("dir").build(preset("digits_smoke"), "classifier")
    torch.save({name: value * float("nan") for name, value in network.state_dict().items()}, tmp_path / "nan.pt")
    torch.save(network, tmp_path / "code.pt")
    (tmp_path / "data").mkdir()
    rows = [png(side=8)] * 89 + [b"\x89PNG"]
    pq.write_table(pa.table({"image": rows, "label": [i % 10 for i in range(90)]}), tmp_path / "data" / "train.parquet")
    cases = {
        "nan.pt' holds numbers that are not finite (NaN or infinity)": ["--target.uri", "nan.pt"],
        "code.pt' holds a pickled object": ["--target.uri", "code.pt"],
        "train.parquet, row 89": ["--data.uri", "data"],
        "the target cannot take 1x8x8 images": ["--target.architecture", "torchvision.models:resnet18"],
        "the denoiser that the settings describe has more": ["--model.width", "2000000000"],
    }
    for message, words in cases.items():
        done = train("digits_smoke", "--launcher", "local", "--dry-run", *words, here=True)
        assert done.code == 2, words
        (line,) = done.error
        assert message in line, words
    assert not (tmp_path / "runs").exists()
    pq.write_table(
        pa.table({"image": rows[:-1], "label": [i % 10 for i in range(89)]}), tmp_path / "data" / "train.parquet"
    )
    words = ("digits_smoke", *LOCAL, "--dry-run", "--data.uri", "data", "--calibration", "plan.json")
    calibrated(tmp_path / "plan.json")
    noted = train(*words, here=True)
    assert (noted.code, noted.err) == (0, "")
    assert "data      no test split is there: 18 of the 89 images are (data.test_share)" in noted.out


@pytest.mark.slow
def test_dry_run_foretells_a_target_with_batch_statistics(train: Train) -> None:
    done = train("digits_smoke", "--launcher", "local", "--dry-run", "--target.architecture", "resnet18", here=True)
    assert done.code == 0, done.err
    assert "foretold from" in done.out


def test_a_calibration_of_another_preset_is_refused_before_training(train: Train, tmp_path: Path) -> None:
    file, pace = tmp_path / "plan.json", {"operations_per_second": 1e9, "images": 1, "memory": 1}
    file.write_text(json.dumps({"calibration": {"device": "a CPU", "paces": {"target": pace}}}))
    done = train("digits_smoke", *LOCAL, "--calibration", str(file))
    assert done.code == 2
    assert done.error == [
        "error: --calibration knows nothing of stage pretrain, but of target: calibrate with this preset"
    ]
    assert not list(tmp_path.glob("runs/target-*"))


def test_a_summary_shows_what_was_foretold_beside_what_came(train: Train, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    calibrated(file)
    words = ("digits_smoke", *LOCAL, "--dry-run", "--calibration", str(file))
    second = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    silent = run_job("train", *words, folder=tmp_path, env=second)
    assert (silent.code, silent.out, silent.summary) == (0, "", {})  # the first of torchrun's tells
    assert not (tmp_path / "runs").exists()
    planned = train(*words)
    assert planned.code == 0, planned.err
    done = train("digits_smoke", *LOCAL)  # it finds what was foretold
    assert done.code == 0, done.err
    rows = done.summary["foretold"]
    assert done.summary["foretold_on"] == "a CPU"
    assert [row["foretold"] for row in rows] == [round(one["seconds"], 1) for one in planned.summary["foretold"]]
    assert [row["name"] for row in rows] == ["target", "pretrain", "dir", "evaluation"]
    for row in rows:
        assert row["took"] == done.summary["took"][row["name"]]
        assert not row["resumed"]
        assert row["foretold_memory"] == 2**29
        assert 2**26 < row["memory"] < 2**34  # the process has PyTorch in it
        lies = sum(file.stat().st_size for file in tmp_path.glob(f"runs/{row['name']}-*/**/*") if file.is_file())
        assert row["stored"] == lies
        assert lies < 1.3 * row["foretold_stored"] or row["name"] == "evaluation"  # a short run keeps fewer checkpoints
    again = train("digits_smoke", *LOCAL, "--calibration", str(file))
    assert again.summary["foretold"] == []  # all of it was there


@pytest.mark.slow
def test_real_parquet_through_the_whole_job(train: Train, real_data: Path) -> None:
    done = train(
        "svhn_smoke", *LOCAL, "--data.uri", str(real_data / "svhn"), "--data.limit", "60", "--target.epochs", "1"
    )
    assert done.code == 0, done.err
    assert {row["defense"] for row in done.summary["results"]} == {"none", "dir"}
