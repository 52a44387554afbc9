"""A step, sharded and replicated, under torchrun; rank 0 prints what was exchanged, as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
import torch.distributed as dist

from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import LInf
from dircluster.config import ParallelConfig, RunConfig
from dircluster.defenses.recipe import Recipe
from dircluster.distributed.deterministic import OrderedReduceScatter, PairwiseSum
from dircluster.distributed.launch import local_workers
from dircluster.distributed.parallel import Parallel, gather_full, reshard
from dircluster.models.modules import under_attack
from dircluster.presets import preset
from dircluster.rng import Stream
from dircluster.training import stages
from dircluster.training.costs import count, exchanged

SENT = [0]
"""Bytes that this worker has sent."""


def count_bytes() -> None:
    """Count what every collective of a training step sends."""
    to_all, gathers = (
        dist.all_to_all_single,
        {n: getattr(dist, n) for n in ("all_gather_into_tensor", "all_gather_single")},
    )

    def counted_to_all(output: torch.Tensor, values: torch.Tensor, *rest: Any, **named: Any) -> Any:
        SENT[0] += values.numel() * values.element_size() * (dist.get_world_size() - 1) // dist.get_world_size()
        return to_all(output, values, *rest, **named)

    reduce = dist.all_reduce

    def counted_reduce(values: torch.Tensor, *rest: Any, **named: Any) -> Any:
        SENT[0] += 2 * values.numel() * values.element_size() * (dist.get_world_size() - 1) // dist.get_world_size()
        return reduce(values, *rest, **named)

    def counting(gather: Any) -> Any:
        def counted(*rest: Any, **named: Any) -> Any:
            part = named.get("input_tensor", named.get("input", rest[1] if len(rest) > 1 else None))
            SENT[0] += part.numel() * part.element_size() * (dist.get_world_size() - 1)
            return gather(*rest, **named)

        return counted

    dist.all_to_all_single, dist.all_reduce = counted_to_all, counted_reduce
    for name, gather in gathers.items():
        setattr(dist, name, counting(gather))


def step(recipe: Recipe, wrapped: torch.nn.Module, parallel: Parallel) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes sent and gradients of a step, crafting included."""
    SENT[0] = 0
    recipe.zero_grad()
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(parallel.rank))
    rows = slice(4 * parallel.rank, 4 * parallel.rank + 4)
    batch = recipe.attack(recipe.batch(images, torch.arange(4), Stream(0, 0, 0, 8, rows, parallel.device)))
    crafted.append(OrderedReduceScatter.calls)
    wrapped(batch)["loss"].backward()
    sent = SENT[0]
    return sent, gather_full({n: p.grad for n, p in recipe.named_parameters() if p.grad is not None})


def validate(recipe: Recipe) -> None:
    """What held-out validation does between two steps: passes through what is deployed, its weights frozen."""
    deployed = recipe.deployed()
    assert deployed is not None
    images = torch.rand(4, 1, 8, 8)
    with under_attack(deployed):
        pgd(deployed, images, torch.arange(4), LInf(0.1), steps=1, step_size=0.1)
        with torch.no_grad():
            deployed(images)


def made(config: RunConfig, parallel: Parallel, recompute: bool = False) -> tuple[Recipe, torch.nn.Module]:
    again = dataclasses.replace(config.parallel, activation_checkpointing=recompute)
    networks = stages.Networks(dataclasses.replace(config, parallel=again), parallel)
    recipe = stages.stages_of(config)[-1].recipe(networks)
    recipe.train()
    pending = PairwiseSum([])
    return recipe, parallel.wrap(recipe, recipe.trained, config.parallel.strategy, False, pending)


crafted: list[int] = []


def main() -> None:
    config = preset("digits_smoke")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, encoder_depth=3),
        training=dataclasses.replace(config.training, batch_size=8),
    )
    sharded = dataclasses.replace(config, parallel=ParallelConfig("fsdp"))
    with local_workers(config.scaling) as parallel:
        count_bytes()
        costs, stage = count(config), stages.find_stage(config, "dir")
        replicated_bytes, expected = step(*made(config, parallel), parallel)
        recipe, wrapped = made(sharded, parallel)
        here = sum(p.to_local().numel() for n, p in recipe.named_parameters() if n.startswith("denoiser"))
        sharded_bytes, gradients = step(recipe, wrapped, parallel)
        calls = OrderedReduceScatter.calls
        _, again = step(*made(sharded, parallel, recompute=True), parallel)
        hgd = preset("digits_hgd_smoke")
        _, before = step(*made(hgd, parallel), parallel)
        recipe, wrapped = made(dataclasses.replace(hgd, parallel=sharded.parallel), parallel)
        validate(recipe)
        reshard(wrapped)
        _, after = step(recipe, wrapped, parallel)
        found = {
            "while crafting": crafted[1],
            "in the backward pass": calls,
            "layers": config.model.encoder_depth + config.model.decoder_depth + 1,
            "share of the weights on a worker": here / costs.purifier_parameters,
            "sharding changes the gradient by": _apart(expected, gradients),
            "recomputing changes the gradient by": _apart(gradients, again),
            "validating changes the gradient by": _apart(before, after),
            "sent to predicted, ddp": replicated_bytes / exchanged(config, stage, 2),
            "sent to predicted, fsdp": sharded_bytes / exchanged(sharded, stage, 2),
        }
        if parallel.first:
            print(json.dumps(found))


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((a - other[n]).abs().max()) for n, a in one.items())


if __name__ == "__main__":
    main()
