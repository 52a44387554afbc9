"""A stored CIFAR-10 defense judged on one GPU: AutoAttack, PGD-20 with EOT, and the same of its target.

    python infra/gpu/judge.py --data FOLDER --defense dircluster/zoo/cifar10-dir --out FOLDER --seconds 500

``--data`` holds parquet files test*. Rows come in the order of what they cost, and each finished shard is kept in
``--out``, so that the same command goes on after it was cut off; ``judged.json`` holds the rows that are whole. What
was found of another defense, on other images or on more of them counts for nothing.
``--processes 4`` shares the shards among so many: one alone leaves a GPU waiting for its host.
``--only autoattack-standard-fixed`` leaves the other rows to another run.
``--rehearse`` does it on a few images with a few steps, in a ball so large that AutoAttack soon ends. It needs torch,
torchvision, pyarrow, scikit-learn and pyautoattack, and neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyautoattack  # noqa: F401  # found missing now, and not at the first row that needs it
import torch

import dircluster
from dircluster.config import AttackConfig, DataConfig, EvaluationConfig, digest
from dircluster.data.sources import load
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.evaluation import EvalShard, Evaluation, run
from dircluster.evaluation.meeting import meet
from dircluster.evaluation.provenance import module_digest
from dircluster.evaluation.results import to_plain
from dircluster.evaluation.store import FolderStore
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import to_bytes

ATTACK = AttackConfig()
"""8/255, steps of 2/255."""


class OutOfTime(Exception):
    """No error: the next shard would begin after the time given."""


def specs(rehearse: bool) -> list[AttackSpec]:
    """What is asked, cheapest first: of the target and of the defense with draws known, then with fresh ones."""
    steps, eot = (2, 2) if rehearse else (20, 20)
    epsilon = 0.5 if rehearse else ATTACK.epsilon
    ball = AttackSpec("pgd", "fixed", epsilon=epsilon, steps=steps, step_size=ATTACK.step_for(20), draws=eot)
    bare = replace(ball, randomness="none", on="target", judged="target", draws=1)
    fresh = replace(ball, randomness="fresh", eot=eot)
    auto = {"attack": "autoattack", "label": "autoattack-standard", "steps": 10 if rehearse else 5000}
    auto |= {"first": 1} if rehearse else {}
    malt = {"attack": "malt", "steps": 3 if rehearse else 100, "step_size": 0.0}
    plain = [bare.unattacked("natural"), bare, ball.unattacked("natural"), ball, fresh.unattacked("natural"), fresh]
    strong = [replace(spec, **changes) for changes in (auto, malt) for spec in (bare, ball)]  # type: ignore[arg-type]
    return [*plain, *strong]


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--defense", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--part", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--only", help="the row of this name")
    parser.add_argument("--shard", type=int, default=250, help="images that an interruption can cost at the most")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(argv)
    named = {f"{spec.name}-{spec.randomness}": spec for spec in specs(given.rehearse)}
    if given.only not in (None, *named):
        parser.error(f"--only is one of {', '.join(named)}")
    asked = [spec for name, spec in named.items() if given.only in (None, name)]
    size = 2 if given.rehearse else given.shard
    given.out.mkdir(parents=True, exist_ok=True)
    others = [
        subprocess.Popen([sys.executable, __file__, *argv, "--part", str(part)])
        for part in range(1, 0 if given.part else given.processes)
    ]
    began, device = time.monotonic(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = DataConfig(name="cifar10", height=32, width=32, channels=3, uri=given.data)
    test = load(replace(data, limit=300 if given.rehearse else None), seed=0).test
    count = min(8 if given.rehearse else given.images, len(test))
    defense = dircluster.load_defense(given.defense).to(device)
    if device.type == "cuda":
        defense.classifier.to(memory_format=torch.channels_last)
    victim = VictimModel(defense, "dir")
    rows = EvaluationConfig(rows=2048 // given.processes).rows
    images, labels = test.pixels(slice(count)).to(device), test.labels[:count].to(device)
    key = digest([module_digest(defense), hashlib.sha256(to_bytes(images) + to_bytes(labels)).hexdigest()])[:12]
    meet(victim, images[:8], int(labels.max()))
    store = FolderStore(given.out / f"shards-of-{size}-{key}")  # whose own names say nothing of these
    judged = Evaluation(asked, count, 0, size, rows, store, victim)

    def rows_of(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return images[first:end], labels[first:end]

    def on_shard(shard: EvalShard, done: int, total: int) -> None:
        spent = time.monotonic() - began
        print(f"{spent:6.1f} s  {shard.name}, {done} of {total} of part {given.part}", flush=True)
        if spent > given.seconds:
            raise OutOfTime

    try:
        run(judged, rows_of, on_shard, lambda place: place % given.processes == given.part)
    except OutOfTime:
        print("out of time; the same command goes on", flush=True)
    if given.part:
        return 0
    for process in others:
        process.wait()
    whole = [spec for spec in asked if all(judged.outcome(shard) is not None for shard in judged.shards(spec))]
    found = to_plain([judged.result(spec, "dir") for spec in whole])
    seconds = [judged.seconds(spec) for spec in whole]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    facts = {
        "defense": given.defense,
        "device": name,
        "torch": torch.__version__,
        "images": count,
        "epsilon": ATTACK.epsilon,
    }
    file = given.out / (f"judged-{given.only}.json" if given.only else "judged.json")
    file.write_text(json.dumps(facts | {"rows": found, "seconds": seconds}, indent=1))
    for row, taken in zip(found, seconds, strict=True):
        print(
            f"{row['defense']:5} {row['attack']:22} {row['protocol']:24} {100 * row['accuracy']:5.1f} %  {taken:6.1f} s"
        )
    return 0 if len(whole) == len(asked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
