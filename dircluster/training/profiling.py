"""Where the time of a step goes, phase by phase, and what share of the machine's arithmetic it uses."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.expectation import expected
from dircluster.config import RunConfig
from dircluster.data.loader import Loader
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.defenses.recipe import Recipe
from dircluster.defenses.stage import Stage
from dircluster.distributed.parallel import Parallel
from dircluster.models.modules import frozen
from dircluster.models.precision import autocast, is_half
from dircluster.training.costs import count, step_operations
from dircluster.training.protocols import Quiet
from dircluster.training.step import Stepper

PHASES = ("draws", "attack", "forward", "backward", "update")
"""Of a step: batch and randomness; adversarial samples; loss terms; gradients; the optimizers."""


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048, tries: int = 5) -> float:
    """Operations a second of the best of some square matrix products: the rate a step is compared with."""
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(tries + 1):
        _wait(device)
        began = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_phases(
    stage: Stage, recipe: Recipe, train: Split, config: RunConfig, parallel: Parallel, steps: int
) -> dict[str, Any]:
    """Train ``stage`` for 1 + ``steps`` steps; -> mean seconds a phase, images/s, losses, shares.

    The first step is not timed.
    """
    device, data, training = parallel.device, config.data, config.training
    loader = Loader(
        train,
        training.batch_size,
        config.seed,
        stage.name,
        crop_padding=data.crop_padding,
        flip=data.flip,
        device=device,
    )
    optimizers = Stepper(stage, recipe, loader, config, parallel, Quiet()).optimizers
    spent, losses = dict.fromkeys(PHASES, 0.0), []
    for step in range(1 + steps):
        recipe.train()
        marks = [_now(device)]
        batch = recipe.batch(*loader(*divmod(step, loader.steps_per_epoch)))
        marks.append(_now(device))
        with autocast(training.precision, device):
            batch = recipe.attack(batch)
        marks.append(_now(device))
        times, total = [0.0, 0.0, 0.0], 0.0
        for update, trained in enumerate(recipe.updates):
            began = _now(device)
            with autocast(training.precision, device):
                loss = recipe(batch, update)["loss"]
            compared = _now(device)
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            back = _now(device)
            for name in trained:
                optimizers[name].step()
            ends = (began, compared, back, _now(device))
            times = [was + b - a for was, (a, b) in zip(times, pairwise(ends), strict=True)]
            total += loss.item()
        losses.append(total)
        if step:
            for phase, taken in zip(PHASES, [b - a for a, b in pairwise(marks)] + times, strict=True):
                spent[phase] += taken / steps
    seconds = sum(spent.values())
    bf16 = is_half(training.precision, device)
    rate = product_rate(device, torch.bfloat16 if bf16 else torch.float32)
    costs = count(config)
    operations = step_operations(config, stage.name)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident()
    return {
        "device": _name(device),
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
        "peak_memory_mib": round(memory / 2**20),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "costs": asdict(costs),
    }


def _now(device: torch.device) -> float:
    _wait(device)
    return time.perf_counter()


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def time_eot(defense: Defended, images: Tensor, labels: Tensor, draws: int, tries: int = 3) -> dict[str, Any]:
    """Best seconds of one EOT gradient, its draws side by side and one after the other; images (N, C, H, W)."""
    generator, best = rng.generator(0, "eot"), {"batched": float("inf"), "calls": float("inf")}

    def model(candidates: Tensor) -> Tensor:
        drawn = defense.purifier.draw(generator, len(candidates))
        return defense.logits(candidates, None if drawn is None else drawn.to(candidates.device))

    with frozen(defense):
        for _ in range(tries + 1):
            for name, rows in (("batched", None), ("calls", len(images))):
                _wait(images.device)
                began = time.perf_counter()
                expected(model, labels, draws, most_rows=rows)(images)
                _wait(images.device)
                best[name] = min(best[name], time.perf_counter() - began)
    return {"images": len(images), "draws": draws, **best}
