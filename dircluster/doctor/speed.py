"""How fast the run's steps are here, what they leave of the device, and where their time goes."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Iterator

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dircluster.config import first_line, named_line
from dircluster.doctor.findings import Finding, at_least, brief, seen, skipped
from dircluster.doctor.machine import Machine, stepper
from dircluster.models.precision import autocast
from dircluster.training.costs import step_operations
from dircluster.training.memory import peak, resting
from dircluster.training.profiling import mean_seconds, now, time_eot, untimed
from dircluster.training.stages import stages_of, trained_stages
from dircluster.training.step import Stepper

LEAST = 0.05
"""Share of the product rate that a step should reach at the preset's own batch size: an H100 has 0.10 to 0.13, without
compilation (docs/results.md)."""
EXPECTED = 0.3
"""The same share, where a step's time is foreseen on a CPU."""
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


def stages(machine: Machine, budget: float) -> Iterator[Finding]:
    """Images a second, share of the product rate and peak memory of every stage that is trained, by batch size."""
    config, ends = machine.config, time.monotonic() + 0.9 * budget
    own = config.training.batch_size
    sizes = (own, 2 * own, 4 * own) if machine.gpu else tuple(dict.fromkeys((max(1, own // 4), own)))
    warm, timed = untimed(config.training.precision, machine.device), 10 if machine.gpu else 2
    rate = machine.rates.get("bf16" if machine.half else "fp32")
    for stage in trained_stages(config):
        operations = step_operations(config, stage.name) / own
        for size in sizes:
            name = f"{stage.name}, batch {size}"
            foreseen = 0.0 if rate is None else (warm + timed) * size * operations / (EXPECTED * rate)
            if time.monotonic() + foreseen > ends:
                yield skipped(
                    name, f"would take about {foreseen:.0f} s, and there are {max(0, ends - time.monotonic()):.0f}"
                )
                continue
            try:
                seconds, crafting, memory = _timed(machine, stage.name, size, warm, timed)
            except RuntimeError as error:
                if any(text in str(error) for text in OUT_OF_MEMORY):
                    note = f"out of memory: {first_line(error)[:80]}"
                    yield Finding(name, "warn" if size == own else "ok", note=note)
                else:  # other stages may still be sound
                    yield Finding(name, "fail", note=named_line(error))
                continue
            finally:
                gc.collect()
                if machine.gpu:
                    torch.cuda.empty_cache()
            crafted = f"{crafting / seconds:.0%} of it crafting"
            crafted += f" ({size / crafting:,.0f} images/s)" if crafting > 0.005 * seconds else ""
            note = f"{1e3 * seconds:,.0f} ms a step, {crafted}, {memory / 2**30:.1f} GiB"
            if rate is not None:
                note = f"MFU {operations * size / seconds / rate:.2f}, {note}"
            if rate is not None and size == own:
                least = LEAST * rate / operations
                yield at_least(name, size / seconds, least, "images/s", note, otherwise="warn")
            else:
                yield seen(name, size / seconds, "images/s", note)


def _timed(machine: Machine, stage: str, size: int, warm: int, timed: int) -> tuple[float, float, int]:
    """Seconds of a step and of its crafting, and bytes at the peak."""
    training = dataclasses.replace(machine.config.training, batch_size=size)
    config = dataclasses.replace(machine.config, training=training)
    with stepper(config, stage, machine.pictures(2 * size), machine.parallel) as made:
        resting(machine.device)
        for step in range(warm):
            made.step(step)
        began = now(machine.device)
        for step in range(warm, warm + timed):
            made.step(step)
        seconds = (now(machine.device) - began) / timed
        memory = peak(machine.device)
        return seconds, _crafting(machine, made), memory


def _crafting(machine: Machine, made: Stepper) -> float:
    recipe = made.recipe.train()
    batch = recipe.batch(*made.loader(0, 0))
    with autocast(made.config.training.precision, machine.device, recipe):
        return mean_seconds(lambda: recipe.attack(batch), machine.device, 1, warm=0)


def expectation(machine: Machine) -> Iterator[Finding]:
    """How many times faster the draws of an EOT gradient are side by side than one after the other."""
    defense = machine.defended()
    if not defense.purifier.randomized:
        yield skipped("EOT, batched against calls", "the purifier draws nothing")
        return
    split = machine.pictures(8 if machine.gpu else 4)
    images, labels = split.pixels().to(machine.device), split.labels.to(machine.device)
    tries, precision = 3 if machine.gpu else 1, machine.config.evaluation.precision
    found = time_eot(defense, images, labels, 20, precision, tries)
    taken = f"{brief(found['batched'])} s, {brief(found['calls'])} s as calls"
    note = f"{found['draws']} draws of {found['images']} images: {taken}"
    ratio = found["calls"] / found["batched"]
    yield at_least("EOT, batched against calls", ratio, 0.9, "times", note, otherwise="warn")


def kernels(machine: Machine, top: int = 10) -> Iterator[Finding]:
    """The kernels (operators, on a CPU) that take most of a step of the last stage."""
    config = machine.config
    if not machine.gpu:
        training = dataclasses.replace(config.training, batch_size=min(config.training.batch_size, 16))
        config = dataclasses.replace(config, training=training)
    size, stage = config.training.batch_size, stages_of(config)[-1].name
    kind, activity, own_time = DeviceType.CPU, ProfilerActivity.CPU, "self_cpu_time_total"
    if machine.gpu:
        kind, activity, own_time = DeviceType.CUDA, ProfilerActivity.CUDA, "self_device_time_total"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains on stderr where there is no GPU
    with stepper(config, stage, machine.pictures(2 * size), machine.parallel) as made:
        made.step(0)
        with profile(activities=[activity]) as profiled:
            made.step(1)
            now(machine.device)
    events = [event for event in profiled.key_averages() if event.device_type == kind]
    rows = [(getattr(event, own_time), event.count, event.key) for event in events]
    total = sum(spent for spent, _, _ in rows)
    for number, (spent, count, key) in enumerate(sorted(rows, reverse=True)[:top], 1):
        yield seen(f"top {number} of {stage}", spent / 1e3, "ms", f"{spent / total:.0%}, {count} times {key[:80]}")
