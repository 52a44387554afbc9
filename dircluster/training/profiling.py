"""Where the time of a step goes, phase by phase, and what share of the machine's arithmetic it uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks.expectation import expected
from dircluster.config import RunConfig
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.defenses.recipe import Recipe
from dircluster.defenses.stage import Stage
from dircluster.distributed.parallel import Parallel
from dircluster.evaluation.evaluation import crafting
from dircluster.evaluation.provenance import machine
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import evaluating, under_attack
from dircluster.models.precision import Precision, autocast, is_half
from dircluster.training.capture import WARM_UP
from dircluster.training.costs import count, forward_operations, step_operations
from dircluster.training.memory import peak, resting
from dircluster.training.protocols import Quiet
from dircluster.training.stages import loader_of
from dircluster.training.step import PHASES, Stepper


def product_rate(device: torch.device, dtype: torch.dtype, size: int | None = None, tries: int = 10) -> float:
    """Operations a second of square matrix products, the mean of ``tries`` after three: what a step is compared with.

    Of side 8192 on a GPU, where 2048 would be the time of a launch, and 1024 on a CPU.
    """
    side = size or (8192 if device.type == "cuda" else 1024)
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / mean_seconds(lambda: left @ right, device, tries)


def _rate_of_all(parallel: Parallel, dtype: torch.dtype) -> float:
    """The product rate of as many devices as share a step: operations are counted on the global batch."""
    return parallel.world * product_rate(parallel.device, dtype)


def mean_seconds(work: Callable[[], object], device: torch.device, tries: int, warm: int = 3) -> float:
    """Mean seconds of ``tries`` calls one after the other, after ``warm`` that are not timed."""
    for _ in range(warm):
        work()
    began = now(device)
    for _ in range(tries):
        work()
    return (now(device) - began) / tries


def answer_costs(module: nn.Module, images: Tensor) -> dict[str, Any]:
    """What an answer of a defense costs: its parameters, and of one image 1e9 multiply-adds and seconds.

    Seconds are those of ``images`` (N, C, H, W) passed together, divided by N.
    """
    with evaluating(module), torch.no_grad():
        operations = forward_operations(module, images[:1])
        seconds = mean_seconds(lambda: module(images), images.device, tries=3, warm=1) / len(images)
    parameters = sum(p.numel() for p in module.parameters())
    return {
        "parameters": parameters,
        "gmac": operations / 2e9,
        "seconds_per_image": seconds,
        "images_together": len(images),
        "machine": machine(images.device),
    }


def untimed(precision: Precision, device: torch.device) -> int:
    """Steps to make before one is timed: they allocate and choose kernels, and on a GPU the last may be recorded.

    On a CPU it takes one in fp32 (digits, 155 and then 139 ms), three in bf16 (204, 139, 90 and then 100 to 120 ms).
    """
    if device.type == "cuda":
        return WARM_UP + 1
    return 3 if is_half(precision, device) else 1


def time_phases(
    stage: Stage, recipe: Recipe, train: Split, config: RunConfig, parallel: Parallel, steps: int
) -> dict[str, Any]:
    """Train ``stage`` for some steps, of which ``steps`` are timed; -> mean seconds a phase, images/s, losses, shares.

    They are the steps of a run, but for the device, which is waited for after each phase; the first ones are
    :func:`untimed`.
    """
    device, training = parallel.device, config.training
    resting(device)
    stepper = stage_stepper(stage, recipe, config, train, parallel)
    spent, since, losses = dict.fromkeys(PHASES, 0.0), 0.0, []

    def passed(phase: str) -> None:
        nonlocal since
        before, since = since, now(device)
        spent[phase] = spent.get(phase, 0.0) + since - before

    stepper.passed = passed
    try:
        for step in range((warm := untimed(training.precision, device)) + steps):
            if step == warm:
                spent = dict.fromkeys(PHASES, 0.0)
            since = now(device)
            losses.append(stepper.step(step)[0]["loss"])
    finally:
        stepper.batches.close()
    most = peak(device)  # before there are matrices whose product is timed
    spent = {phase: taken / steps for phase, taken in spent.items()}
    seconds = sum(spent.values())
    bf16 = is_half(training.precision, device)
    rate = _rate_of_all(parallel, torch.bfloat16 if bf16 else torch.float32)
    costs = count(config)
    operations = step_operations(config, stage.name)
    return {
        "device": device_name(device),
        "precision": "bf16" if bf16 else "fp32",
        "batch_size": training.batch_size,
        "steps": steps,
        "seconds": {phase: round(value, 4) for phase, value in spent.items()},
        "seconds_a_step": round(seconds, 4),
        "images_per_second": round(training.batch_size / seconds, 2),
        "gflop_a_step": round(operations / 1e9, 1),
        "gflop_per_second": round(operations / seconds / 1e9, 1),
        "matrix_product_gflop_per_second": round(rate / 1e9, 1),
        "share_of_matrix_product_rate": round(operations / seconds / rate, 3),
        "peak_memory_mib": round(most / 2**20),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "costs": asdict(costs),
    }


def time_in_turns(
    steps: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device, warm: int
) -> dict[str, list[float]]:
    """Seconds of each of ``steps``, given the number of the round: one after the other in every round.

    What slows the machine for a while then slows all of them. Of ``warm`` rounds before there are none.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm + rounds):
        for name, step in steps.items():
            began = now(device)
            step(number)
            if number >= warm:
                found[name].append(now(device) - began)
    return found


def compare(
    variants: Mapping[str, tuple[Stage, Recipe, RunConfig]], train: Split, parallel: Parallel, rounds: int
) -> list[dict[str, Any]]:
    """Whole training steps of several recipes in turns: a row each, with its ratio to the first one's in each round.

    All are of one precision. Seconds are medians; ``spread`` holds the quartiles of the ratio. Shares of the
    matrix-product rate go by what the run's own recipe counts, in however many operations the same is computed.
    """
    device, precision = parallel.device, next(iter(variants.values()))[2].training.precision
    steppers = {name: stage_stepper(*variant, train, parallel) for name, variant in variants.items()}
    try:
        steps = {name: made.step for name, made in steppers.items()}
        seconds = time_in_turns(steps, rounds, device, untimed(precision, device))
    finally:
        for made in steppers.values():
            made.batches.close()
    rows, first = [], next(iter(seconds.values()))
    rate = _rate_of_all(parallel, torch.bfloat16 if is_half(precision, device) else torch.float32)
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(first, taken, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        stage, _, config = variants[name]
        middle, images = median(taken), config.training.batch_size
        spread = [round(low, 3), round(high, 3)]
        rows.append(
            {
                "step": name,
                "seconds": round(middle, 4),
                "images_per_second": round(images / middle, 1),
                "times_the_first": round(median(ratios), 3),
                "spread": spread,
                "share_of_matrix_product_rate": round(step_operations(config, stage.name) / middle / rate, 3),
            }
        )
    return rows


def stage_stepper(stage: Stage, recipe: Recipe, config: RunConfig, train: Split, parallel: Parallel) -> Stepper:
    """The steps of a stage, in the order and on the batches of a run that says nothing."""
    return Stepper(stage, recipe, loader_of(stage, train, config, parallel), config, parallel, Quiet())


def now(device: torch.device) -> float:
    """Seconds of a clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """The card's name, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def time_eot(
    defense: Defended, images: Tensor, labels: Tensor, draws: int, precision: Precision, tries: int = 3
) -> dict[str, Any]:
    """Best seconds of one EOT gradient, its draws side by side and one after the other; images (N, C, H, W).

    ``precision`` is that of an evaluation, which decides by it what its attacks are crafted in.
    """
    crafted = crafting(precision, VictimModel(defense, defense.name), images.device)
    generator, best = rng.generator(0, "eot"), {"batched": float("inf"), "calls": float("inf")}

    def model(candidates: Tensor) -> Tensor:
        drawn = defense.purifier.draw(generator, len(candidates))
        return defense.logits(candidates, None if drawn is None else drawn.to(candidates.device))

    with under_attack(defense), autocast(crafted, images.device, defense):
        for _ in range(tries + 1):
            for name, rows in (("batched", None), ("calls", len(images))):
                began = now(images.device)
                expected(model, labels, draws, most_rows=rows)(images)
                best[name] = min(best[name], now(images.device) - began)
    return {"images": len(images), "draws": draws, **best}
