"""Sums in pairs, whoever holds the parts; shares that differ by an image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dircluster.config import ConfigError, error_from_plain, error_to_plain
from dircluster.distributed.deterministic import PairwiseSum, _pairwise, keeps_statistics_apart, normalize_globally
from dircluster.distributed.parallel import Parallel, _shard, gather_full
from dircluster.models.classifiers import BasicBlock
from dircluster.training.checkpoint import CheckpointError, DamagedError
from dircluster.training.locks import TakenOverError
from dircluster.training.step import pieces

PARTS = torch.tensor([1e8, 1.0, -1e8, 1.0, 3e7, 0.25, -3e7, 0.5])
"""Their float32 sum depends on the order."""


def accumulated(parts: torch.Tensor) -> float:
    parameter = torch.nn.Parameter(torch.zeros(1))
    pending = PairwiseSum([parameter])
    for number, part in enumerate(parts):
        parameter.grad = part.reshape(1).clone()
        if number < len(parts) - 1:
            pending.put()
    pending.join_all()
    assert parameter.grad is not None
    return float(parameter.grad)


def test_four_parts_are_summed_in_pairs() -> None:
    a, b, c, d = PARTS[:4]
    assert accumulated(PARTS[:4]) == float((a + b) + (c + d)) != float(((a + b) + c) + d)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_micro_batches_and_workers_make_one_tree(workers: int) -> None:
    shares = PARTS.reshape(workers, -1)
    over_workers = _pairwise(torch.tensor([[accumulated(share)] for share in shares]))
    assert float(over_workers) == accumulated(PARTS)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_any_number_of_parts_is_summed(count: int) -> None:
    parts = torch.arange(1.0, count + 1)
    assert accumulated(parts) == float(_pairwise(parts[:, None])) == count * (count + 1) / 2


@pytest.mark.parametrize(
    ("images", "world", "microbatch", "expected"),
    [(16, 1, 4, 4), (16, 2, 4, 2), (16, 4, 4, 1), (128, 1, None, 1), (128, 3, None, 1), (128, 3, 42, 2), (10, 4, 1, 2)],
)
def test_every_worker_passes_equally_often(images: int, world: int, microbatch: int | None, expected: int) -> None:
    assert pieces(images, world, microbatch) == expected


def test_gradients_are_scaled_to_the_norm() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(4))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    alone = Parallel(0, 1, torch.device("cpu"))
    assert alone.clip(parameters, 100.0) == pytest.approx(28**0.5)
    assert torch.equal(parameters[0].grad, torch.full((3,), 2.0))
    assert alone.clip(parameters, 1.0) == pytest.approx(28**0.5)
    assert torch.cat([p.grad for p in parameters]).norm() == pytest.approx(1.0)


def test_copies_are_not_changed_by_later_steps() -> None:
    weights = {"w": torch.zeros(2)}
    kept = gather_full(weights)
    weights["w"] += 1
    assert kept["w"].tolist() == [0, 0]
    assert gather_full(weights, keep=False) == {}


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, DamagedError, TakenOverError])
def test_an_error_of_the_first_worker_keeps_its_class_on_all(
    kind: type[ConfigError], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    def share(self: Parallel, value: Any) -> Any:
        if self.first:
            sent.append(json.dumps(value))
        return json.loads(sent[0])

    def fails() -> None:
        raise kind("one line")

    monkeypatch.setattr(Parallel, "share", share)
    for rank in (0, 1):
        with pytest.raises(ConfigError, match="one line") as caught:
            Parallel(rank, 2, torch.device("cpu")).first_does(fails)
        assert type(caught.value) is kind


def test_only_errors_of_this_package_are_restored() -> None:
    class Own(CheckpointError):
        """Nobody else has it."""

    assert type(error_from_plain(error_to_plain(Own("x")))) is CheckpointError
    for name in ("builtins.SystemExit", "os.system", "dircluster.nowhere.ConfigError"):
        assert type(error_from_plain({"kinds": [name], "message": "x"})) is ConfigError


TWO = """
import torch, torch.distributed as dist, sys
from dircluster.training.locks import TakenOverError
from dircluster.distributed.parallel import Parallel
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
workers = Parallel(rank, 2, torch.device("cpu"))
print(workers.share({"a": [1, 2.5, None], "b": "\u00e4"} if rank == 0 else "ignored"))
print(workers.first_does(lambda: ["x"]))
def fails():
    raise TakenOverError("busy")
try:
    workers.first_does(fails)
except TakenOverError as error:
    print("restored", error)
dist.destroy_process_group()
"""


@pytest.mark.long
def test_two_processes_share_what_the_first_one_finds(tmp_path: Path) -> None:
    begun = [
        subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        for process in begun:
            out, _ = process.communicate(timeout=300)
            assert out.decode().splitlines() == ["{'a': [1, 2.5, None], 'b': '\u00e4'}", "['x']", "restored busy"]
    finally:
        for process in begun:  # the other one may wait for ever
            process.kill()


def test_buffers_travel_only_where_workers_may_differ_in_them() -> None:
    together = normalize_globally(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), torch.device("cpu"))
    assert not keeps_statistics_apart(together)
    assert not keeps_statistics_apart(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)))
    assert keeps_statistics_apart(nn.Sequential(together, nn.BatchNorm1d(2)))  # each worker's are of its share
    assert keeps_statistics_apart(nn.utils.spectral_norm(nn.Linear(2, 2)))


@pytest.mark.parametrize("half", [False, True])
def test_a_target_that_lies_in_memory_as_on_a_gpu_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Its channels lie last, in bf16 its statistics stay in fp32, and workers on CPUs may stand beside GPUs."""
    images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    target = nn.Sequential(BasicBlock(3, 8, 2)).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    expected = target(images).detach()
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        _shard(target, half, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.testing.assert_close(target(images).float(), expected, atol=0.02 if half else 1e-6, rtol=0)
            target.train()(images).sum().backward()
    finally:
        dist.destroy_process_group()
    assert {p.device_mesh.device_type for p in target.parameters()} == {"cpu"}


@pytest.mark.parametrize("how", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_global_normalization_is_that_of_one_worker(tmp_path: Path, how: dict[str, Any]) -> None:
    plain, shared = nn.BatchNorm2d(3, **how), nn.BatchNorm2d(3, **how)
    normalize_globally(shared, torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for seed in range(3):
            images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) + seed
            torch.testing.assert_close(shared(images), plain(images))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(shared.state_dict(), plain.state_dict())
