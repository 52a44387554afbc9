"""How workers share the shards of an evaluation out. It decides nothing of what a shard finds."""

from __future__ import annotations

from dircluster.attacks.apgd import SURVIVORS
from dircluster.evaluation.attack_table import find_attack
from dircluster.evaluation.evaluation import EvalShard, Evaluation

CLASSES = 10
"""Of the images, as far as the length of an attack is guessed."""
TARGET = 0.25
"""What a pass through the bare target takes of one through the defense, roughly."""
AUTOATTACK = 2000
"""Passes of an image under AutoAttack that its spec does not tell of, roughly."""


def shares(evaluation: Evaluation, world: int) -> list[set[int]]:
    """The places of the shards that each of ``world`` workers does: the longest dealt first, to who has least.

    All workers find the same, whatever is finished already.
    """
    lengths = [length(shard) for shard in evaluation.shards()]
    dealt, loads = [set[int]() for _ in range(world)], [0.0] * world
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        worker = min(range(world), key=lambda worker: loads[worker])
        dealt[worker].add(place)
        loads[worker] += lengths[place]
    return dealt


def length(shard: EvalShard) -> float:
    """Passes of an image through the defense that a shard takes, roughly; a gradient is three."""
    spec, attack = shard.spec, find_attack(shard.spec.attack)
    if attack.gradients is not None:
        crafting = 3 * attack.gradients(spec, CLASSES, SURVIVORS) * spec.eot
    elif attack.counts == "steps":
        crafting = 3 * spec.steps * spec.restarts * spec.eot
    else:
        crafting = (spec.steps + AUTOATTACK * (spec.attack == "autoattack")) * spec.eot
    crafting *= TARGET if spec.on == "target" else 1 if spec.attack == "bpda" else spec.average
    judging = spec.draws * (TARGET if spec.judged == "target" else spec.average)
    return (shard.rows[1] - shard.rows[0]) * (crafting + judging)
