"""What a run will take, before it is paid for: from some seconds of its own steps on this machine, or another's.

A stage's step is timed on random images of the run's shape, on the whole batch where that takes seconds and else on as
many images as do: what it takes more of the last size than of the one before carries it over to the whole batch, and
operations, counted on the step itself, to the whole run. What storage, a network between workers, and the start of a
job take is not foretold.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dircluster import torchrun
from dircluster.attacks.apgd import SURVIVORS
from dircluster.config import ConfigError, RunConfig
from dircluster.cores import cores
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.defenses.recipe import Recipe
from dircluster.defenses.stage import Stage
from dircluster.distributed.parallel import Parallel
from dircluster.evaluation.evaluation import crafted_in, crafting
from dircluster.evaluation.pictures import to_pixels
from dircluster.evaluation.rows import FEW, fitting_rows
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import under_attack
from dircluster.training import stages
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.costs import (
    evaluation_operations,
    followed,
    forward_operations,
    gradient_operations,
    meta_images,
    meta_networks,
    recipe_on_meta,
    step_operations,
)
from dircluster.training.memory import peak, resting
from dircluster.training.profiling import device_name, now, stage_stepper
from dircluster.training.validation import GAUGED, PICTURED, ROWS

EVALUATION = "evaluation"
STILL = 1e-12
"""The learning rate of steps that are timed: hundreds of them on noise must not end in infinities."""
LONG = 15
"""Budgets of seconds in which algorithms are chosen, and which are waited for once a stage."""
LITTLE = 1000
"""Images, over all epochs, from fewer of which nothing is learned: no more survive then than chance has right, and
attacks that leave out what they have fooled soon end."""


@dataclass(frozen=True)
class Pace:
    """What a machine was seen to do in a stage, or in an evaluation."""

    operations_per_second: float
    images: int
    """That were passed together."""
    memory: int
    """Peak bytes on the device (of the process on a CPU), carried over to the whole batch."""
    once: float = 0.0
    """Seconds that the first step takes more than the next ones: libraries are loaded, algorithms chosen."""


@dataclass(frozen=True)
class Calibration:
    """The paces of a machine, by stage."""

    device: str
    """As device_name calls it."""
    paces: Mapping[str, Pace]

    @property
    def on_cpu(self) -> bool:
        """Whether memory is a process's, in which the images of a run lie too."""
        return self.device.startswith("CPU")


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a stage."""

    at: str
    """The stage or the evaluation whose pace the passes on held-out images have."""
    steps: float
    """Of training, at the stage's own pace."""
    passes: float = 0.0
    """Of selection and of the gauge of overfitting."""
    pictures: float = 0.0
    """Which one worker draws."""

    @property
    def total(self) -> float:
        return self.steps + self.passes + self.pictures


@dataclass(frozen=True)
class Forecast:
    """What a stage will take."""

    name: str
    seconds: float
    memory: int
    """Bytes."""
    stored: int
    """Bytes that stay in storage."""


def as_launched(config: RunConfig, launcher: str) -> RunConfig:
    """``config`` with the workers, threads and device that it has when it is launched from here, by ``ray`` or
    ``local``ly.

    Of a cluster that is joined nothing is known: it gives the most workers, each the cores that one process has here.
    """
    scaling, here = config.scaling, cores()
    workers, threads, device = scaling.most, scaling.threads, scaling.device
    if launcher == "local":
        workers = torchrun.size()
    elif not os.environ.get("RAY_ADDRESS"):
        gpus = torch.cuda.device_count()
        workers = scaling.workers_on(here, gpus)
        threads = threads or max(1, here // workers)
        if device == "auto" and gpus < scaling.least:  # for fewer GPUs than workers Ray takes CPUs
            device = "cpu"
    return replace(config, scaling=replace(scaling, workers=workers, threads=threads, device=device))


def calibrate(config: RunConfig, parallel: Parallel, budget: float = 2.0) -> Calibration:
    """Time a step of every stage and a gradient of the evaluation, some times ``budget`` seconds each.

    All workers of ``parallel`` do it together. One that is alone takes the share that it would have among them.
    """

    def forget(steps: dict[int, tuple[Any, Iterator[int]]]) -> None:
        for made, _ in steps.values():
            made.batches.close()
        steps.clear()

    world = parallel.world
    share = -(-config.training.batch_size // config.scaling.most)
    networks, paces = stages.Networks(config, parallel), {}
    first = replace(config, attack=replace(config.attack, pipeline_every=1))  # every step that is timed is a whole one
    for stage in stages.trained_stages(first):
        slow = {name: replace(knobs, lr=STILL) for name, knobs in stage.optimizers.items()}
        still = replace(stage, optimizers=slow, epochs=10**6)  # none of its steps is the last
        steps: dict[int, tuple[Any, Iterator[int]]] = {}

        def step(images: int, stage: Stage = still, steps: Any = steps) -> None:
            if images not in steps:
                forget(steps)  # the optimizers of one are enough
                networks.renew(tuple(networks))  # they may lie in shards
                recipe = stage.recipe(networks)
                training = replace(first.training, batch_size=images * world)
                run = replace(first, training=training, scaling=replace(first.scaling, workers=world))
                made = stage_stepper(stage, recipe, run, _random(first, images * world), parallel)
                steps[images] = made, itertools.count()
            made, numbers = steps[images]
            made.step(next(numbers))  # in a run's order: what is made ahead is the next one's

        per_image = step_operations(first, stage.name) / config.training.batch_size
        paces[stage.name] = _pace(step, per_image, share, parallel, budget)
        forget(steps)
    networks.renew(tuple(networks))
    defense = networks.defense.defended(config, networks).to(parallel.device).fixed(0)

    def passed(run: RunConfig) -> int:
        return gradient_operations(networks.defense.defended(run, meta_networks(run)).fixed(0), meta_images(run, 1))

    per_image = followed(config, passed)
    judged = config.evaluation
    some = _random(config, FEW).pixels(slice(FEW)).to(parallel.device)
    usual = judged.rows or fitting_rows(VictimModel(defense.fresh(), config.defense), some)
    rows = min(judged.usual_rows, judged.batch_size, judged.images or judged.batch_size)
    most = min(usual, config.data.classes * rows)  # MALT tries several classes of an image together
    paces[EVALUATION] = _pace(lambda n: _gradient(defense, config, n), per_image, rows, parallel, budget, most)
    return Calibration(device_name(parallel.device), paces)


def forecast(config: RunConfig, found: Calibration, train: int, held_out: int, test: int) -> list[Forecast]:
    """What each stage and the evaluation will take, given how many images there are of each split.

    Raises ConfigError where the calibration knows nothing of a stage.
    """
    made, data = [], config.data
    images = held_out + test + (0 if data.stream else train) if found.on_cpu else 0
    held = images * data.channels * data.height * data.width
    for stage in stages.trained_stages(config):
        pace = _pace_of(found, stage.name)
        seconds = stage_seconds(config, stage, found, train, held_out) + pace.once
        memory = pace.memory + held
        memory += _sizes(config, stage).on_its_way if found.on_cpu else 0
        made.append(Forecast(stage.name, seconds, memory, _stored(config, stage, train)))
    pace = _pace_of(found, EVALUATION)
    judging = judging_seconds(config, found, train, test) + pace.once
    return [*made, Forecast(EVALUATION, judging, pace.memory + held, 0)]


def judging_seconds(config: RunConfig, found: Calibration, train: int, test: int, bare: bool = False) -> float:
    """What the suite will take on so many test images, or its rows of the ``bare`` target alone.

    Raises ConfigError where the calibration knows no evaluation.
    """
    operations = evaluation_operations(config, surviving(config, train), bare)
    images = min(test, config.evaluation.images or test)
    pace = _pace_of(found, EVALUATION)
    return operations * images / (pace.operations_per_second * config.scaling.most)


def surviving(config: RunConfig, train: int) -> float:
    """The share of test images that is taken to survive an attack, given how many there are to train on."""
    seen = train * sum(stage.epochs for stage in stages.trained_stages(config))
    return SURVIVORS if seen >= LITTLE or config.target.uri is not None else 1 / config.data.classes


def stage_seconds(config: RunConfig, stage: Stage, found: Calibration, train: int, held_out: int) -> float:
    """What a stage will take. Raises ConfigError where the calibration knows nothing of it."""
    return seconds_of(stage_work(config, stage, train, held_out), config, stage.name, found)


def stage_work(config: RunConfig, stage: Stage, train: int, held_out: int) -> Work:
    """What a stage computes, with what it does on held-out images."""
    work = Work(stage.name, 0.0)
    if not stage.epochs:
        return work
    batch, recipe = config.training.batch_size, recipe_on_meta(config, stage.name)
    deployed, images = recipe.deployed(), min(held_out, config.training.select_images)
    judged = _times(stage, config.training.select_every)
    steps = float(stage.epochs * (train // batch))
    if recipe.attacks_deployed:  # the gauge of overfitting crafts as a step does
        steps += judged * min(images, GAUGED) / batch
    work = replace(work, steps=steps * step_operations(config, stage.name))
    if deployed is None or not images:
        return work
    work = replace(work, passes=judged * _selection(config, recipe, images))
    if not isinstance(deployed, Defended):
        return work
    drawn = _times(stage, config.tracking.picture_every) * _picture(config, deployed)
    return replace(work, at=EVALUATION, pictures=drawn)  # gradients of the whole pipeline as well


def seconds_of(work: Work, config: RunConfig, stage: str, found: Calibration) -> float:
    """What a stage's work takes on its workers. Raises ConfigError where the calibration knows nothing of it."""
    workers = config.scaling.most
    seconds = work.steps / (_pace_of(found, stage).operations_per_second * workers)
    return seconds + (work.passes / workers + work.pictures) / _pace_of(found, work.at).operations_per_second


def to_plain(found: Calibration) -> dict[str, Any]:
    """For a summary."""
    return asdict(found)


def from_plain(plain: Mapping[str, Any]) -> Calibration:
    """The inverse of :func:`to_plain`. Raises ValueError, LookupError and others where it is none."""
    paces = {
        name: Pace(
            float(pace["operations_per_second"]), int(pace["images"]), int(pace["memory"]), float(pace.get("once", 0))
        )
        for name, pace in plain["paces"].items()
    }
    if not all(
        0 < pace.operations_per_second < math.inf and pace.images > 0 and 0 <= pace.once < math.inf
        for pace in paces.values()
    ):
        raise ValueError("a pace that is none")
    return Calibration(str(plain["device"]), paces)


def from_summary(file: Path) -> Calibration:
    """The calibration in a summary of ``--dry-run``. Raises ConfigError where there is none."""
    try:
        return from_plain(json.loads(file.read_text())["calibration"])
    except OSError as error:
        raise ConfigError(f"--calibration {file} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"--calibration {file} holds none: give the --summary of a --dry-run") from error


def _pace_of(found: Calibration, name: str) -> Pace:
    if name not in found.paces:
        known = ", ".join(found.paces)
        raise ConfigError(f"--calibration knows nothing of stage {name}, but of {known}: calibrate with this preset")
    return found.paces[name]


def _pace(
    step: Callable[[int], object],
    per_image: float,
    full: int,
    parallel: Parallel,
    budget: float,
    most: int | None = None,
) -> Pace:
    """Time ``step`` on ever more images, up to ``full``, while the next is not thought to take more than the budget.

    Seconds grow with images by a part alone, so that sizes are timed until two of them tell by which. Each is done
    twice: the first time, after which memory is read, allocates and chooses algorithms, which in bf16 takes longer than
    a step: what it takes more counts once. What takes LONG budgets is not done again. What the first worker measures
    counts for all of them. Memory is that of ``most`` images where a pass may have more than ``full``.
    """
    device, images = parallel.device, min(full, 2)
    seconds, peaks, once = dict[int, float](), dict[int, float](), 0.0
    while True:
        before = resting(device)
        seconds[images] = first = _timed(step, images, parallel)
        long = first > LONG * budget
        peaks[images] = peak(device)
        if not long:
            seconds[images] = _timed(step, images, parallel)
            once = max(once, first - seconds[images])
        longer = min(full, 4 * images)
        grows = len(seconds) > 1 and seconds[images] > seconds[max(size for size in seconds if size < images)]
        if images == full or long or (grows and _carried_over(seconds, 0, longer) > budget):
            break
        images = longer
    tries = [seconds[images]]
    while sum(tries) < budget and len(tries) < 20:
        tries.append(_timed(step, images, parallel))
    seconds[images] = mean(tries)
    memory = int(_carried_over(peaks, before, most or full))
    return Pace(per_image * full / _carried_over(seconds, 0, full), images, memory, once)


def _carried_over(found: Mapping[int, float], before: float, full: int) -> float:
    """Seconds or peak bytes of ``full`` images, from those of fewer: two sizes tell apart what does not grow."""
    *fewer, images = found
    more, of = (found[images] - found[fewer[-1]], images - fewer[-1]) if fewer else (found[images] - before, images)
    return found[images] + max(0.0, more) * (full - images) / of


def _timed(step: Callable[[int], object], images: int, parallel: Parallel) -> float:
    began = now(parallel.device)
    step(images)
    return float(parallel.share(now(parallel.device) - began))


def _random(config: RunConfig, images: int) -> Split:
    data, generator = config.data, torch.Generator().manual_seed(0)
    shape = (max(images, 2), data.channels, data.height, data.width)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.randint(data.classes, (len(pixels),), generator=generator))


def _gradient(defense: Defended, config: RunConfig, images: int) -> None:
    """One gradient of an attack on the whole pipeline, in the precision that attacks are crafted in."""
    device = next(defense.parameters()).device
    asked = _random(config, images).pixels(slice(images)).to(device).requires_grad_(True)
    precision = crafting(config.evaluation.precision, VictimModel(defense.fresh(), config.defense), device)
    with under_attack(defense), crafted_in(precision, device, defense):
        torch.autograd.grad(defense(asked).sum(), asked)


def _times(stage: Stage, every: int) -> int:
    """How often comes what comes after so many epochs of a stage, and at its end."""
    return -(-stage.epochs // every)


def _selection(config: RunConfig, recipe: Recipe, images: int) -> float:
    """Operations of one held-out selection, and of the gauge of overfitting but for the samples that it crafts."""
    deployed = recipe.deployed()
    assert deployed is not None
    image = meta_images(config, 1)
    forward, gradient = forward_operations(deployed, image), gradient_operations(deployed, image)
    steps = config.training.select_steps or config.attack.steps
    gauge = min(images, GAUGED) * (20 * gradient + 2 * forward) if recipe.attacks_deployed else 0.0
    return images * (steps * gradient + 2 * forward) + gauge


def _picture(config: RunConfig, deployed: Defended) -> float:
    """Operations of a picture of restored images, which shows eight."""
    image = meta_images(config, 1)
    forward, gradient = forward_operations(deployed, image), gradient_operations(deployed, image)
    return PICTURED * (config.attack.steps * gradient + forward)


def _picture_bytes(config: RunConfig) -> int:
    """Bytes of the pixels of a picture of restored images."""
    data = config.data
    return to_pixels(torch.zeros(ROWS, PICTURED, data.channels, data.height, data.width)).size


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what a stage keeps."""

    result: int
    trained: int
    """The weights that it trains."""
    moments: tuple[int, ...]
    """Of each optimizer."""
    mean: int
    """The running mean of the weights, 0 where there is none; so of the others."""
    best: int
    unsent: int
    """A picture that MLflow has not taken: it lies beside, and in each checkpoint; counted as if none ever were."""

    @property
    def checkpoint(self) -> int:
        return self.trained + sum(self.moments) + self.mean + self.unsent

    @property
    def on_its_way(self) -> int:
        """Of a save in memory: copies of all of it and of the best weights, and one group twice more as it is made into
        a file."""
        return self.checkpoint + self.best + 2 * max((self.trained, *self.moments))


def _sizes(config: RunConfig, stage: Stage) -> _Sizes:
    networks = meta_networks(config)
    size = {name: sum(4 * t.numel() for t in networks[name].state_dict().values()) for name in networks}
    trained = sum(size[name] for name in stage.optimizers)
    drawn = config.tracking.enabled and isinstance(recipe_on_meta(config, stage.name).deployed(), Defended)
    return _Sizes(
        result=sum(size[name] for name in stage.modules),
        trained=trained,
        moments=tuple(size[name] * (1 if knobs.name == "sgd" else 2) for name, knobs in stage.optimizers.items()),
        mean=trained if stage.ema is not None else 0,
        best=trained if stage.keep == "best" else 0,
        unsent=_picture_bytes(config) if drawn else 0,
    )


def _stored(config: RunConfig, stage: Stage, train: int) -> int:
    """Bytes of a finished stage: its result, the newest checkpoints and the best weights that they name."""
    sizes, steps = _sizes(config, stage), stage.epochs * (train // config.training.batch_size)
    checkpoints = min(Checkpoints.KEEP, -(-steps // config.storage.checkpoint_every))
    return sizes.result + checkpoints * sizes.checkpoint + sizes.best + sizes.unsent
