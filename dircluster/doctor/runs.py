"""Whether training goes as it should: killed and resumed, compiled and captured, all to the same weights."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dircluster.config import ConfigError, RunConfig, named_line
from dircluster.distributed.launch import WorkerError, on_local_workers
from dircluster.distributed.parallel import Parallel
from dircluster.doctor.findings import Finding, at_least, at_most, largest, skipped
from dircluster.doctor.machine import Machine, plain, stepper, true_fp32
from dircluster.presets import preset
from dircluster.training import checkpoint
from dircluster.training.protocols import NoTracker, Quiet, Status
from dircluster.training.run import Run
from dircluster.training.stages import Networks, stages_of

SMOKE = "digits_smoke"
"""The preset that is killed and resumed: target, pre-training and DIR in a few steps each."""
PATIENCE = 60.0
"""Seconds that a step has to be committed in."""
STEPS = 6
"""Steps that are compared: a captured one is replayed after three."""
APART = {"losses": 1e-3, "moves": 0.1}
"""How far compiled or captured steps may be from plain ones: relative differences of losses, and of how weights move.
Crafting and AdamW follow signs, which rounding flips where a gradient is next to nothing; steps that do nothing are 1
apart, and those against the gradient 2."""


class _KilledAfter(Quiet):
    """Kills its process once so many steps were shown, and one of their stage lies in ``folder``."""

    def __init__(self, steps: int, folder: Path) -> None:
        self.left, self.folder = steps, folder

    def show(self, status: Status) -> None:
        self.left -= 1
        if self.left > 0:
            return
        ends = time.monotonic() + PATIENCE
        while not list(self.folder.glob(f"{status.stage}-*/step-*/COMMIT")) and time.monotonic() < ends:
            time.sleep(0.01)  # another thread commits
        os.kill(os.getpid(), signal.SIGKILL)


class _Listening(Quiet):
    """Knows the step at which a stage went on."""

    resumed = 0

    def say(self, line: str) -> None:
        if found := re.search(r"resuming at step (\d+)", line):
            self.resumed = int(found[1])


def resumed(machine: Machine) -> Iterator[Finding]:
    """A smoke run that is killed in its last stage and resumed, against one that is not: how far its weights are."""
    smoke = preset(SMOKE)
    data, often = dataclasses.replace(smoke.data, limit=80), dataclasses.replace(smoke.storage, checkpoint_every=1)
    scaling = dataclasses.replace(machine.config.scaling, workers=1, threads=torch.get_num_threads())
    config = plain(dataclasses.replace(smoke, data=data, storage=often, scaling=scaling))
    names = [stage.name for stage in stages_of(config)]
    with tempfile.TemporaryDirectory(prefix="dircluster-doctor-") as folder, _repeatable():
        whole = _trained(machine.parallel, config, f"{folder}/whole", Quiet())
        try:
            on_local_workers(scaling, _killed, config, f"{folder}/broken", _steps_before_last(config) + 3)
        except WorkerError as error:
            if "SIGKILL" not in str(error):
                raise
        listening = _Listening()
        again = _trained(machine.parallel, config, f"{folder}/broken", listening)
    note = f"{SMOKE}: {', '.join(names)}"
    yield at_least("step at which a killed run went on", listening.resumed, 1, note=note)
    start = {name: value.cpu() for name, value in Networks(config, machine.parallel)["denoiser"].state_dict().items()}
    bound = 0.02 if machine.gpu else 0.0  # a GPU may add in another order; a forgotten optimizer is 0.15 apart
    yield at_most("resumed weights, apart", _apart(again, whole, start), bound, "of their way", "0 is equal bits")


def _trained(parallel: Parallel, config: RunConfig, folder: str, console: Quiet) -> dict[str, Tensor]:
    """The denoiser's weights at the end of the last stage."""
    config = dataclasses.replace(config, storage=dataclasses.replace(config.storage, uri=folder))
    last = stages_of(config)[-1].name
    Run(config, parallel, NoTracker(), console, until=last).execute()
    (final,) = Path(folder).glob(f"{last}-*/final")
    return checkpoint.read(final).tensors["denoiser"]


def _killed(parallel: Parallel, config: RunConfig, folder: str, steps: int) -> None:
    """The same, in a process that dies after so many steps."""
    with _repeatable():
        _trained(parallel, config, folder, _KilledAfter(steps, Path(folder)))


def _steps_before_last(config: RunConfig) -> int:
    limit, data = config.data.limit or 0, config.data
    steps = (limit - max(1, round(data.held_out * limit))) // config.training.batch_size
    return steps * sum(stage.epochs for stage in stages_of(config)[:-1])


@contextmanager
def _repeatable() -> Iterator[None]:
    """Deterministic kernels inside, where there are any, in true fp32. Only plain attention adds in a fixed order."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(action="ignore"), true_fp32(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def steps(machine: Machine) -> Iterator[Finding]:
    """Steps of the last stage from the same weights: compiled and captured ones against plain ones, in fp32."""
    batch = min(machine.config.training.batch_size, 32)
    config = plain(machine.config, batch_size=batch, microbatch=None)
    kinds = {word: (name, _without(machine, name)) for word, name in (("compiled", "compile"), ("captured", "capture"))}
    count = 2 if all(reason for _, reason in kinds.values()) else STEPS
    with true_fp32():
        losses, start, moved = _steps(config, machine, count)
        yield at_least("plain steps move the weights", _distance(moved, start), 1e-12, note=_shown(losses))
        for word, (name, reason) in kinds.items():
            if reason:
                yield skipped(f"{word} steps", reason)
                continue
            try:
                other, _, there = _steps(plain(config, **{name: "on"}), machine, count)
            except ConfigError as error:  # such as a recipe whose steps differ
                yield skipped(f"{word} steps", str(error))
                continue
            except Exception as error:  # of a compiler, say: the other kind may still be sound
                yield Finding(f"{word} steps", "fail", note=named_line(error))
                continue
            apart = largest(abs(a - b) / abs(a) for a, b in zip(losses, other, strict=True))
            yield at_most(f"losses of {word} steps, apart", apart, APART["losses"], note=_shown(other))
            yield at_most(f"moves of {word} steps, apart", _apart(there, moved, start), APART["moves"], "of their way")


def _without(machine: Machine, name: str) -> str:
    """Why there are no steps with that switch here; empty where there are."""
    if machine.gpu or getattr(machine.config.training, name) == "on":
        return ""
    if name == "compile":
        return "compiling takes more than a minute on a CPU; --training.compile on asks for it"
    return "there is nothing to capture on a CPU"


def _steps(config: RunConfig, machine: Machine, count: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of some steps, and the weights that are trained before and after them."""
    stage = stages_of(config)[-1].name
    split = machine.pictures(count * config.training.batch_size)
    with stepper(config, stage, split, machine.parallel) as made:
        before = {name: value.detach().cpu().clone() for name, value in made.parameters.items()}
        losses = [made.step(step)[0]["loss"] for step in range(count)]
        return losses, before, {name: value.detach().cpu().clone() for name, value in made.parameters.items()}


def _apart(found: dict[str, Tensor], reference: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far weights are from where they should be, over how far these went."""
    return _distance(found, reference) / _distance(reference, start)


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    total = sum(float((one[name].double() - other[name].double()).square().sum()) for name in other)
    return float(total**0.5)


def _shown(losses: list[float]) -> str:
    return f"losses {', '.join(f'{loss:.4f}' for loss in losses)}"
