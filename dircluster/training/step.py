"""One step of a stage: its batch, its gradients over micro-batches and workers, and the optimizers' updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import ConfigError, RunConfig
from dircluster.data.loader import Loader
from dircluster.data.stream import StreamLoader
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Stage
from dircluster.distributed.deterministic import PairwiseSum
from dircluster.distributed.parallel import Parallel, accumulates, reshard, without_sync
from dircluster.models.precision import autocast, is_half
from dircluster.training.ahead import Batches, is_ahead
from dircluster.training.capture import CapturedStep, CaptureError, Recorder, Terms, captured_step
from dircluster.training.interrupt import interruptible
from dircluster.training.optim import is_fused, is_sharded, make_optimizer
from dircluster.training.protocols import Console
from dircluster.training.running_mean import RunningMean

PHASES = ("draws", "attack", "forward", "backward", "update")
"""Of a step: batch and randomness; adversarial samples; loss terms; gradients; the optimizers and what follows them."""
REPLAY = "replay"
"""The phase of a captured step in place of attack, forward and backward."""


class NonFiniteLoss(RuntimeError):
    """A loss term or gradient norm is NaN or infinite; no weight was changed by it."""


@dataclass
class Reading:
    """Loss terms and gradient norms of a step by name, on their device until somebody reads them."""

    step: int
    terms: list[Terms] = field(default_factory=list)
    """Of each update."""
    norms: dict[str, Tensor] = field(default_factory=dict)


def _ambient(stage: str, update: int) -> str:
    """The stream that library code draws from in an update (dropout)."""
    return f"{stage}/ambient" if update == 0 else f"{stage}/ambient/{update}"


def pieces(images: int, world: int, microbatch: int | None) -> int:
    """Micro-batches a worker cuts its share of a global batch into: as many on each, whoever has an image more."""
    share = math.ceil(images / world)
    return min(math.ceil(share / (microbatch or share)), images // world)


def check_shared(stage: Stage, alone: str | None, config: RunConfig, parallel: Parallel) -> None:
    """Raise ConfigError where the workers cannot share the steps of a stage; ``alone`` is its recipe's."""
    if parallel.world > 1 and alone:
        raise ConfigError(f"{stage.name} {alone}: use scaling.workers 1")
    if parallel.world > 1 and stage.ema is not None and config.parallel.strategy == "fsdp":
        raise ConfigError(f"parallel.strategy must be ddp where {stage.name} keeps a mean of its weights (ema)")


class Stepper:
    """Makes the steps of a stage, by their numbers."""

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        loader: Loader | StreamLoader,
        config: RunConfig,
        parallel: Parallel,
        console: Console,
        recorder: Recorder | None = None,
    ) -> None:
        """``recorder`` captures steps; a CUDA graph does, on a GPU, when it is not given."""
        self.stage, self.recipe, self.loader = stage, recipe, loader
        self.config, self.parallel, self.console = config, parallel, console
        self.steps = stage.epochs * loader.steps_per_epoch
        check_shared(stage, recipe.alone, config, parallel)
        self.pending = PairwiseSum([])
        half = is_half(config.training.precision, parallel.device)
        self.wrapped = parallel.wrap(recipe, recipe.trained, config.parallel.strategy, half, self.pending)
        self.parameters = {n: p for n, p in recipe.named_parameters() if p.requires_grad}
        self.pending.parameters = list(self.parameters.values())
        self.still = [child for name, child in recipe.named_children() if name not in recipe.trained]
        sharded = is_sharded(config, parallel)
        fused = {n: is_fused(config.training, parallel.device, knobs, sharded) for n, knobs in stage.optimizers.items()}
        self.optimizers = {n: make_optimizer(self._of(n), knobs, fused[n]) for n, knobs in stage.optimizers.items()}
        self.guards = all(fused.values()) and parallel.world == 1
        """Whether a fused optimizer itself leaves weights alone where a loss is not finite: nobody waits to read it."""
        ahead = is_ahead(config.training, parallel.device)
        self.batches = Batches(self._make_batches, self.steps, parallel.device, ahead)
        self.captured = captured_step(config, parallel, recipe, recorder, self._capture)
        self.mean = RunningMean(stage.ema, self._state())
        self.passed: Callable[[str], None] = lambda phase: None
        """Called by its name once the host has left a phase of a step, of which each may come several times."""

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """One step: -> loss terms averaged over the global batch, and the signal that asks to stop (or 0)."""
        reading, signal = self._step(step)
        return self._read(reading), signal

    def _step(self, step: int) -> tuple[Reading, int]:
        """The same, its loss terms unread where the optimizers guard the weights.

        Otherwise they are read, and found finite, before an optimizer is asked to change anything.
        """
        epoch, index = divmod(step, self.loader.steps_per_epoch)
        batches = self.batches(step)
        self.passed("draws")
        self.recipe.train()
        reshard(self.wrapped)  # validation gathers frozen weights, and may leave them so
        for name, optimizer in self.optimizers.items():
            rate = self.stage.optimizers[name].rate((step + 1) / self.loader.steps_per_epoch, self.stage.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
        reading, signal = Reading(step), 0
        for update, trained in enumerate(self.recipe.updates):
            with rng.seeded_torch_rng(self.config.seed, _ambient(self.stage.name, update), epoch, index):
                (names, values), asked = self._update(batches, update)
            signal = signal or asked
            guarded = self.guards and all(self.optimizers[name].state for name in trained)  # the first one makes it
            if not guarded:
                values = values.cpu()
                self._must_be_finite(dict(zip(names, values.tolist(), strict=True)), step)
            reading.terms.append((names, values))
            norms = {f"gradient norm of {name}": norm for name in trained if (norm := self._clip(name)) is not None}
            if guarded:
                self._guard(trained, torch.stack([*values, *norms.values()]))
                reading.norms |= norms
            else:
                self._must_be_finite({name: float(norm) for name, norm in norms.items()}, step)
            for name in trained:
                self.optimizers[name].step()
            self.passed("update")
        if self.mean.tensors:
            self.mean.follow(self._state(), step)
            self.passed("update")
        return reading, signal

    def _clip(self, name: str) -> Tensor | None:
        """Clip the gradients of a module where its optimizer asks for it: -> their norm before."""
        most = self.stage.optimizers[name].clip
        return None if most is None else self.parallel.clip(self._of(name), most)

    def _guard(self, trained: Sequence[str], values: Tensor) -> None:
        """Let the fused optimizers of these modules change nothing where one of the values is not finite."""
        broken = (~values.isfinite().all()).float()
        for name in trained:
            self.optimizers[name].found_inf = broken  # type: ignore[attr-defined]  # what a GradScaler sets

    def _read(self, reading: Reading) -> dict[str, float]:
        """Loss terms of a step, their total under ``loss``. Raises NonFiniteLoss."""
        terms: dict[str, float] = {}
        loss = 0.0
        for names, values in reading.terms:
            found = dict(zip(names, values.tolist(), strict=True))
            self._must_be_finite(found, reading.step)
            terms |= found
            loss += found["loss"]
        self._must_be_finite({name: float(norm) for name, norm in reading.norms.items()}, reading.step)
        return {**terms, "loss": loss}

    def _make_batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches of a step, with all of their draws."""
        images, labels, stream = self.loader(*divmod(step, self.loader.steps_per_epoch))
        count = pieces(self.config.training.batch_size, self.parallel.world, self.config.training.microbatch)
        bounds = [len(labels) * i // count for i in range(count + 1)]
        return [
            self.recipe.batch(images[begin:end], labels[begin:end], stream.narrow(begin, end), step)
            for begin, end in pairwise(bounds)
        ]

    def _update(self, batches: list[Batch], update: int) -> tuple[Terms, int]:
        """Gradients of one update, over micro-batches that the first one attacks: -> loss terms, and a signal or 0."""
        if (replayed := self._replayed(batches[0])) is not None:
            self.passed(REPLAY)
            return replayed, self.console.stop_signal()
        names: tuple[str, ...] = ()
        total: Tensor | None = None
        images, world = self.config.training.batch_size, self.parallel.world
        stateless = not any(True for name in self.recipe.trained for _ in self.recipe.get_submodule(name).buffers())
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(batches):
            # Shares may differ by an image: weighted so, their mean over the workers is that of the batch.
            weight, last = len(batch.labels) * world / images, number == len(batches) - 1
            # A step can be left as long as it has changed neither weights nor running statistics.
            safe = update == 0
            if update == 0:
                with self._autocast(self.recipe), self._leavable(stateless or number == 0):
                    batch = batches[number] = self.recipe.attack(batch)
                self.passed("attack")
            with without_sync(self.wrapped, last=last):
                with self._autocast(*self.still), self._leavable(stateless and safe):
                    losses = self.wrapped(batch, update)
                self.passed("forward")
                torch.autograd.backward(losses["loss"] * weight)
            self.passed("backward")
            names = tuple(losses)
            if not last and not accumulates(self.wrapped):
                self.pending.put()
            part = torch.stack([value.detach().double() for value in losses.values()]) * weight
            total = part if total is None else total + part
        assert total is not None
        self.pending.join_all()
        signal = self.console.stop_signal()
        if world == 1:
            return (names, total), signal
        flags = torch.tensor([float(signal > 0), float(signal)], dtype=torch.float64, device=total.device)
        mean = self.parallel.mean(torch.cat([total, flags])).cpu()
        asked, number_sum = mean[-2:].tolist()
        return (names, mean[:-2]), round(number_sum / asked) if asked else 0

    def _replayed(self, batch: Batch) -> Terms | None:
        """The captured step on a batch; None where there is none. Raises ConfigError where it was asked for."""
        if self.captured is None:
            return None
        try:
            return self.captured(batch)
        except CaptureError as error:
            if self.config.training.capture == "on":
                text = f"training.capture is on, but {self.stage.name} cannot be captured: {error}; use auto or off"
                raise ConfigError(text) from error
            self.console.say(f"{self.stage.name}: its step cannot be captured ({error}); it runs uncaptured")
            self.captured = None
            return None

    def _capture(self, recorder: Recorder) -> CapturedStep:
        return CapturedStep(self._whole, list(self.parameters.values()), recorder, self.batches.settle)

    def _whole(self, batch: Batch) -> Terms:
        """Attack, forward and backward of a batch that passes whole: what is captured."""
        with self._autocast(self.recipe):
            batch = self.recipe.attack(batch)
        with self._autocast(*self.still):
            losses = self.recipe(batch)
        torch.autograd.backward(losses["loss"])
        return tuple(losses), torch.stack([value.detach().double() for value in losses.values()])

    def _leavable(self, safe: bool = True) -> AbstractContextManager[None]:
        """Where a single worker may leave at once when it hears a signal; several have to agree on a step."""
        single = self.parallel.world == 1 and safe
        return interruptible(self.watched, self.console, leave=single)

    @property
    def watched(self) -> nn.Module:
        """The module whose passes a signal may end: the target, which every attack goes through."""
        return next((child for name, child in self.recipe.named_children() if name == "classifier"), self.recipe)

    def _autocast(self, *still: nn.Module) -> Any:
        return autocast(self.config.training.precision, self.parallel.device, *still)

    def _state(self) -> dict[str, Tensor]:
        """Weights and statistics of what is trained, by name: the very tensors."""
        return {
            f"{name}.{k}": v
            for name in self.recipe.trained
            for k, v in self.recipe.get_submodule(name).state_dict().items()
        }

    def _of(self, module: str) -> list[Tensor]:
        return [p for n, p in self.parameters.items() if n.startswith(f"{module}.")]

    def _must_be_finite(self, terms: dict[str, float], step: int) -> None:
        broken = [name for name, value in terms.items() if name != "loss" and not math.isfinite(value)]
        if broken or not math.isfinite(terms.get("loss", 0.0)):
            raise NonFiniteLoss(
                f"{self.stage.name}: {', '.join(broken) or 'loss'} is not finite at step {step + 1};"
                " lower the learning rate, or set the optimizer's clip"
            )
