"""What a step costs: floating-point operations counted on the step itself, parameters, bytes exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dircluster.attacks.apgd import SURVIVORS
from dircluster.config import RunConfig, flatten, to_dict, with_values
from dircluster.defenses.base import Purifier
from dircluster.defenses.recipe import Recipe
from dircluster.defenses.stage import Stage, architecture
from dircluster.defenses.table import find_defense
from dircluster.distributed.parallel import SHARDED_ALONE, gathered_half
from dircluster.evaluation.attack_runner import AttackRunner, judge
from dircluster.evaluation.attack_table import AttackSpec, find_attack
from dircluster.evaluation.session import plan
from dircluster.evaluation.victim import VictimModel
from dircluster.models import classifiers
from dircluster.models.modules import evaluating, under_attack
from dircluster.rng import Stream
from dircluster.training.stages import find_stage
from dircluster.training.step import pieces

IMAGES = 2
"""That pass together where a step is counted."""
FEW = 2
"""Times that repeated work is counted at: the first may differ from the others."""


@dataclass(frozen=True)
class Costs:
    """Of one image: floating-point operations of a forward pass, a multiply-add counted as two; and parameters."""

    purifier_forward: int
    target_forward: int
    purifier_parameters: int
    target_parameters: int


def exchanged(config: RunConfig, stage: Stage, workers: int, half: bool = False) -> int:
    """Bytes that each of ``workers`` sends in a step of ``stage``, for what it trains, and receives.

    ddp: the mean of the gradients, reduced in parts and gathered. fsdp: weights for every pass of crafting and update,
    those of blocks again for its backward half, and the gradients reduced in parts. A gathered weight takes four bytes,
    that of a block two where it is gathered in ``half`` the precision; a gradient takes four. Passes are those of
    ``stage.passes``: what passes through a target that learns together with a denoiser besides is not counted.
    """
    if workers == 1:
        return 0
    networks = meta_networks(config)
    trained = [networks[name] for name in stage.optimizers]
    parameters = sum(map(_parameters, trained))
    weights = 4 * parameters
    if config.parallel.strategy == "ddp":
        return 2 * weights * (workers - 1) // workers
    passes = stage.passes * pieces(config.training.batch_size, workers, config.training.microbatch)
    parts = [part for network in trained for part in network.modules() if isinstance(part, SHARDED_ALONE)]
    blocks = sum(map(_parameters, parts))
    sent = sum((2 if half and gathered_half(part) else 4) * _parameters(part) for part in parts)
    gathered = passes * (2 * sent + 4 * (parameters - blocks))
    return (gathered + weights) * (workers - 1) // workers


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations as they run, forward and backward: those of products and convolutions.

    Attention is counted where it runs as the products that it is made of, see :func:`counting`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **given, out_val=out))
        return out


@contextmanager
def counting() -> Iterator[Operations]:
    """Count operations, attention as the plain products that it is made of."""
    with sdpa_kernel(SDPBackend.MATH), Operations() as found:
        yield found


def forward_operations(module: nn.Module, *inputs: Tensor | None) -> int:
    """Operations of one forward pass in eval mode, where an image may be alone, counted operator by operator."""
    with counting() as found, evaluating(module), torch.no_grad():
        module(*inputs)
    return found.total


def gradient_operations(module: nn.Module, images: Tensor) -> int:
    """Operations of a forward pass and the gradient with respect to images (N, C, H, W)."""
    asked = images.detach().requires_grad_(True)
    with counting() as found, under_attack(module):
        torch.autograd.grad(module(asked).sum(), asked)
    return found.total


@cache
def evaluation_operations(config: RunConfig, survivors: float = SURVIVORS, bare: bool = False) -> float:
    """Operations that the suite takes for an image, or those of its rows of the ``bare`` target alone.

    ``survivors`` is the share of images that is taken to survive attacks which leave out those that they have fooled.
    Each attack runs for one step and for two on the meta device: what a step takes follows, however many there are.
    Those that look into values cannot run there: what they take is known.
    """
    return followed(config, lambda run: _counted(run, survivors, bare))


def _autoattack(spec: AttackSpec, classes: int, survivors: float) -> tuple[float, float]:
    """Gradients and other passes of an image under AutoAttack (Croce and Hein 2020), each attack on what is left.

    ``standard``: 100 steps of APGD, as many towards each of nine classes, FAB in as many, which passes an image once
    more a step, and Square. ``rand``: 100 steps by each of two losses, whoever survives.
    """
    if spec.randomness == "fresh":
        return 2 * 101, 0
    targets = min(9, classes - 1)
    aimed = targets * 101 if classes >= 4 else 0
    return 101 + survivors * (aimed + targets * 100), survivors * (targets * 100 + (spec.steps or 5000))


SEARCHES: dict[str, Callable[[AttackSpec, int, float], tuple[float, float]]] = {
    "autoattack": _autoattack,
    "square": lambda spec, classes, survivors: (0, survivors * spec.steps * spec.eot),
}
"""What attacks of the library take, which look into values: gradients and other passes of an image."""


def followed(config: RunConfig, counted: Callable[[RunConfig], float]) -> float:
    """``counted(config)``, operations. Of a purifier that repeats its work they follow from FEW times and one more."""
    repeats = find_defense(config.defense).repeats
    often = flatten(to_dict(config))[repeats] if repeats else 0
    if often <= FEW:
        return counted(config)
    few, more = (counted(with_values(config, {repeats: FEW + n})) for n in (0, 1))
    return few + (more - few) * (often - FEW)


def _counted(config: RunConfig, survivors: float, bare: bool) -> float:
    """As :func:`evaluation_operations`, all of it counted."""
    networks = meta_networks(config)
    victim = VictimModel(find_defense(config.defense).defended(config, networks), config.defense)
    settings, images = config.evaluation, meta_images(config, IMAGES)
    labels = torch.zeros(IMAGES, dtype=torch.int64, device="meta")
    total = 0.0

    def operations(work: Callable[[AttackRunner], object], spec: AttackSpec) -> int:
        with counting() as found, under_attack(*victim.modules):
            work(AttackRunner(victim, spec, 0, 0, settings.usual_rows))
        return found.total

    def whole(runner: AttackRunner) -> None:
        judged(runner, runner(images, labels)[0])

    def judged(runner: AttackRunner, made: Tensor = images) -> None:
        with torch.no_grad():
            judge(victim, runner.spec, 0, 0, settings.usual_rows)(made, labels)

    def gradient(runner: AttackRunner) -> None:
        runner.value_and_grad(runner.model(IMAGES), labels)(images)

    def passed(runner: AttackRunner) -> None:
        with torch.no_grad():
            runner.model(IMAGES)(images)

    for spec in plan(victim, config.attack, replace(settings, verdict=False)).specs:
        if bare and not spec.bare:
            continue
        attack = find_attack(spec.attack)
        if attack.gradients is not None:
            total += attack.gradients(spec, config.data.classes, survivors) * operations(gradient, spec)
            total += operations(judged, spec)
        elif spec.attack in SEARCHES:
            gradients, passes = SEARCHES[spec.attack](spec, config.data.classes, survivors)
            total += gradients * operations(gradient, spec) + passes * operations(passed, spec)
            total += operations(judged, spec)
        else:
            one = operations(whole, replace(spec, steps=min(spec.steps, 1)))
            more = operations(whole, replace(spec, steps=2)) - one if spec.steps > 1 else 0
            total += one + more * (spec.steps - 1 if spec.steps > 1 else 0)
    return total / IMAGES


def recipe_on_meta(config: RunConfig, stage: str) -> Recipe:
    """The recipe of a stage, by its name, over networks on the meta device."""
    networks = meta_networks(config)
    for network in networks.values():
        if isinstance(network, Purifier):
            network.recompute = config.parallel.activation_checkpointing
    return find_stage(config, stage).recipe(networks).train()


@cache
def step_operations(config: RunConfig, stage: str) -> int:
    """Operations of one global batch in ``stage``, by its name: attack, forward and backward; of batches a mean.

    The step itself runs, on two images and the meta device, where nothing is computed: layers of batch statistics need
    two. Where activations are computed again, that counts too.
    """
    recipe, every = recipe_on_meta(config, stage), config.attack.pipeline_every
    labels = torch.zeros(IMAGES, dtype=torch.int64, device="meta")

    def operations(number: int) -> int:
        stream = Stream(config.seed, 0, 0, IMAGES, slice(0, IMAGES), torch.device("meta"))
        with counting() as found:
            batch = recipe.attack(recipe.batch(meta_images(config, IMAGES), labels, stream, number))
            for update in range(len(recipe.updates)):
                torch.autograd.backward(recipe(batch, update)["loss"])
        return found.total

    mean = operations(0) if every == 1 else (operations(0) + (every - 1) * operations(1)) / every
    return int(mean * config.training.batch_size / IMAGES)


def meta_networks(config: RunConfig) -> dict[str, nn.Module]:
    """The run's networks on the meta device: without weights."""
    defense = find_defense(config.defense)
    with torch.device("meta"):
        made = {name: make() for name, make in defense.modules(config).items()}
        return made | {"classifier": classifiers.build(architecture(config), config.data)}


def meta_images(config: RunConfig, images: int) -> Tensor:
    """So many images of the run's shape (N, C, H, W) on the meta device: without values."""
    data = config.data
    return torch.zeros(images, data.channels, data.height, data.width, device="meta")


def count(config: RunConfig) -> Costs:
    """Costs of the run's purifier and target, counted on the meta device: nothing is computed or downloaded."""
    image = meta_images(config, 1)

    def networks_of(run: RunConfig) -> tuple[Purifier, nn.Module]:
        networks = meta_networks(run)
        purifier = networks[find_defense(run.defense).purifier]
        assert isinstance(purifier, Purifier)
        return purifier, networks["classifier"]

    def purified(run: RunConfig) -> int:
        purifier, _ = networks_of(run)
        drawn = purifier.draw(torch.Generator(), 1)
        return forward_operations(purifier, image, None if drawn is None else drawn.to("meta"))

    purifier, classifier = networks_of(config)
    return Costs(
        int(followed(config, purified)),
        forward_operations(classifier, image),
        _parameters(purifier),
        _parameters(classifier),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
