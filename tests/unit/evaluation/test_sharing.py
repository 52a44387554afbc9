"""How workers share the shards of an evaluation out: each once, and nobody much longer than the others."""

from __future__ import annotations

import pytest
from torch import nn

from dircluster.config import AttackConfig, EvaluationConfig
from dircluster.evaluation.evaluation import Evaluation
from dircluster.evaluation.sharing import length, shares
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.suites import SUITES, suite
from dircluster.evaluation.victim import VictimModel


def planned(name: str, images: int) -> Evaluation:
    specs = suite(name, AttackConfig(), EvaluationConfig(), randomized=True, purifies=True, transfers=True, masked=True)
    victim = VictimModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "plain")
    return Evaluation(specs, images, 0, 128, 256, MemoryStore(), victim)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shards_are_dealt_once_and_evenly(name: str, world: int) -> None:
    evaluation = planned(name, 359)
    shards, dealt = list(evaluation.shards()), shares(evaluation, world)
    assert sorted(place for share in dealt for place in share) == list(range(len(shards)))
    loads = [sum(length(shards[place]) for place in share) for share in dealt]
    assert max(loads) - min(loads) <= max(map(length, shards))
    if world == 2:
        assert max(loads) < 1.1 * sum(loads) / 2


@pytest.mark.parametrize("name", SUITES)
def test_everybody_attacks_the_bare_target(name: str) -> None:
    evaluation, world = planned(name, 10_000), 4
    shards = list(evaluation.shards())
    bare = [place for place, shard in enumerate(shards) if shard.spec.judged == "target" and shard.spec.steps]
    assert len(bare) > 10 * world
    for share in shares(evaluation, world):
        assert len(share.intersection(bare)) < 0.5 * len(bare)


def test_bpda_passes_once_a_draw_and_is_judged_by_the_mean_of_several() -> None:
    (shard,) = (shard for shard in planned("paper", 1).shards() if shard.spec.name == "bpda40-mean-of-10")
    assert length(shard) == 3 * 40 * 10 + 5 * 10


def test_a_query_is_one_pass_and_a_gradient_three() -> None:
    shards = [shard for shard in planned("rigorous", 1).shards() if shard.spec.judged == shard.spec.on == "defense"]
    factors = {"square": 1, "pgd": 3}
    told = [shard for shard in shards if shard.spec.attack in factors and shard.spec.average == 1]
    assert {shard.spec.attack for shard in told} == set(factors)
    for shard in told:
        spec = shard.spec
        steps = spec.steps * spec.restarts * spec.eot
        assert length(shard) == factors[spec.attack] * steps + spec.draws
