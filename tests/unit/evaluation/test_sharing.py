"""How workers share the shards of an evaluation out: each once, and nobody much longer than the others."""

from __future__ import annotations

import pytest
from torch import nn

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation.evaluation import Evaluation
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.suites import SUITES, suite
from dircluster.evaluation.victim import VictimModel


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_are_dealt_once_and_evenly(name: str, world: int) -> None:
    specs = suite(name, AttackConfig(), EvaluationConfig(), randomized=True, purifies=True, transfers=True, masked=True)
    victim = VictimModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "plain")
    evaluation = Evaluation(specs, 359, 0, 128, 256, MemoryStore(), victim)
    shares, shards = [evaluation.share(rank, world) for rank in range(world)], list(evaluation.shards())
    assert sorted((shard for share in shares for shard in share), key=shards.index) == shards
    assert all(share == sorted(share, key=shards.index) for share in shares)  # in the order of the table
    loads = [sum(shard.passes for shard in share) for share in shares]
    assert max(loads) - min(loads) <= max(shard.passes for shard in shards) + len(shards)
    if world == 2:
        assert max(loads) < 1.1 * sum(loads) / 2
