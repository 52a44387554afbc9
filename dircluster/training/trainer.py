"""The training loop that every stage runs: steps, held-out selection, checkpoints, resume, interruption."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import ConfigError, RunConfig
from dircluster.data.loader import Loader
from dircluster.data.split import Split
from dircluster.data.stream import StreamLoader
from dircluster.defenses.base import Defended
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Stage
from dircluster.distributed.deterministic import PairwiseSum
from dircluster.distributed.parallel import Parallel, accumulates, gather_full, reshard, shard_like, without_sync
from dircluster.evaluation.pictures import to_pixels
from dircluster.models.precision import autocast, is_half
from dircluster.training.ahead import Batches, is_ahead
from dircluster.training.capture import CapturedStep, CaptureError, Recorder, Terms, captured_step
from dircluster.training.checkpoint import Checkpoint, Checkpoints
from dircluster.training.checkpoint_writer import CheckpointWriter, Save
from dircluster.training.interrupt import Interrupted, interruptible, waiting
from dircluster.training.optim import is_fused, make_optimizer, optimizer_tensors, restore_optimizer
from dircluster.training.protocols import Console, StageRecord, Status
from dircluster.training.running_mean import RunningMean
from dircluster.training.validation import held_out_accuracy, restoration_grid

INTERRUPTED_PATIENCE = 20.0
"""Seconds that an interrupted run takes to commit its checkpoint."""


MOST_UNREAD = 32
"""Steps whose loss terms may wait on their device until they are read."""


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


class Trainer:
    """Trains one stage from wherever its checkpoints left off."""

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        loader: Loader | StreamLoader,
        held_out: Split,
        config: RunConfig,
        parallel: Parallel,
        checkpoints: Checkpoints,
        record: StageRecord,
        console: Console,
        recorder: Recorder | None = None,
    ) -> None:
        """``recorder`` captures steps; a CUDA graph does, on a GPU, when it is not given."""
        self.stage, self.recipe = stage, recipe
        self.loader, self.held_out, self.config, self.parallel = loader, held_out, config, parallel
        self.checkpoints, self.record, self.console = checkpoints, record, console
        self.steps = stage.epochs * loader.steps_per_epoch
        if parallel.world > 1 and len(recipe.updates) > 1:
            raise ConfigError(f"{stage.name} has several updates a step, which one worker makes: use scaling.workers 1")
        if parallel.world > 1 and stage.ema is not None and config.parallel.strategy == "fsdp":
            raise ConfigError(f"parallel.strategy must be ddp where {stage.name} keeps a mean of its weights (ema)")
        self.pending = PairwiseSum([])
        half = is_half(config.training.precision, parallel.device)
        self.wrapped = parallel.wrap(recipe, recipe.trained, config.parallel.strategy, half, self.pending)
        self.parameters = {n: p for n, p in recipe.named_parameters() if p.requires_grad}
        self.pending.parameters = list(self.parameters.values())
        fused = is_fused(config.training, parallel.device)
        self.optimizers = {n: make_optimizer(self._of(n), knobs, fused) for n, knobs in stage.optimizers.items()}
        ahead = is_ahead(config.training, parallel.device)
        self.batches = Batches(self._make_batches, self.steps, parallel.device, ahead)
        self.captured = captured_step(config, parallel, recipe, recorder, self._capture)
        self.guards = fused and parallel.world == 1
        """Whether a fused optimizer itself leaves weights alone where a loss is not finite: nobody waits to read it."""
        self.unread: list[Reading] = []
        self.validates = recipe.deployed() is not None
        self.mean = RunningMean(stage.ema, self._state())
        self.best: dict[str, Any] | None = None
        self.new_best: tuple[str, dict[str, Tensor], dict[str, Any]] | None = None
        self.saved = -1
        self.writer = CheckpointWriter(checkpoints, console.say) if parallel.first else None

    def run(self) -> dict[str, Any] | None:
        """Train to the end; the recipe then holds the stage's result. -> what is known of its best weights.

        Raises Interrupted after committing a checkpoint, NonFiniteLoss on all workers before the update, and
        CheckpointError where storage took no checkpoint for ``storage.patience`` seconds at the end. Where storage
        takes none, a run that was interrupted or broke says so, and still ends as what it is.
        """
        try:
            self._train()
        except (Interrupted, NonFiniteLoss) as end:
            interrupted = isinstance(end, Interrupted)
            try:
                self._commit(INTERRUPTED_PATIENCE if interrupted else self.config.storage.patience)
            except ConfigError as error:
                self.console.say(str(error))
            raise
        finally:
            self.batches.close()
            self.captured = None
        self._commit(self.config.storage.patience)
        self.parallel.wait()
        if self.best is not None and self.best["folder"] is not None:
            self._load_weights(self.checkpoints.at(self.best["folder"]).tensors["model"])
        elif self.mean.tensors:
            self._load_weights(self.mean.tensors)
        return self.best

    def _commit(self, patience: float) -> None:
        """Wait until what was saved is stored; all workers hear where it is not."""

        def close() -> None:
            assert self.writer is not None
            with waiting(self.console):
                self.writer.close(patience)

        self.parallel.first_does(close)

    def _train(self) -> None:
        window, since = 0, time.monotonic()
        start = self._resume()
        if self._selects_after(start) and (self.best is None or self.best["last"]["step"] != start):
            self._judge_or_save(start)
            if start == self.steps:
                self._save(start, judged=True)
        for step in range(start, self.steps):
            done = step + 1
            reading, signal = self._step_or_save(step)
            self.unread.append(reading)
            window += 1
            epoch, inside = divmod(done, self.loader.steps_per_epoch)
            last = done == self.steps
            logs = self.parallel.first and (done % self.config.tracking.log_every == 0 or last)
            if logs or len(self.unread) >= MOST_UNREAD:
                self._read_all()
            if logs:
                self._log(done, self._read(reading), window, time.monotonic() - since)
                window, since = 0, time.monotonic()
            began = time.monotonic()
            if self._selects_after(done):
                self._judge_or_save(done)
            if inside == 0 and (epoch % self.config.tracking.picture_every == 0 or last):
                self._picture(done)
            if signal or done % self.config.storage.checkpoint_every == 0 or last:
                self._save(done)
            since += time.monotonic() - began
            if signal:
                raise Interrupted(signal)

    def _selects_after(self, done: int) -> bool:
        epoch, inside = divmod(done, self.loader.steps_per_epoch)
        return (
            self.validates
            and done > 0
            and inside == 0
            and (epoch % self.config.training.select_every == 0 or done == self.steps)
        )

    def _judge_or_save(self, done: int) -> None:
        """Held-out selection; where a signal ends it, it is made up for on resume."""
        try:
            with self._leavable():
                self._judge(done)
        except Interrupted:
            self._save(done)
            raise

    def _step_or_save(self, step: int) -> tuple[Reading, int]:
        """A step, or a checkpoint of what was before it where a signal ends it halfway."""
        try:
            return self._step(step)
        except Interrupted:
            self._save(step)
            raise

    def _leavable(self, safe: bool = True) -> AbstractContextManager[None]:
        """Where a single worker may leave at once when it hears a signal; several have to agree on a step."""
        single = self.parallel.world == 1 and safe
        return interruptible(self.watched, self.console, leave=single)

    @property
    def watched(self) -> nn.Module:
        """The module whose passes a signal may end: the target, which every attack goes through."""
        return next((child for name, child in self.recipe.named_children() if name == "classifier"), self.recipe)

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
        self.mean.follow(self._state(), step)
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

    def _read_all(self) -> None:
        """Find out whether all steps so far were sound: before anything of them is recorded, judged or stored."""
        unread, self.unread = self.unread, []
        for reading in unread:
            self._read(reading)

    def _make_batches(self, step: int) -> list[Batch]:
        """This worker's micro-batches of a step, with all of their draws."""
        images, labels, stream = self.loader(*divmod(step, self.loader.steps_per_epoch))
        count = pieces(self.config.training.batch_size, self.parallel.world, self.config.training.microbatch)
        bounds = [len(labels) * i // count for i in range(count + 1)]
        return [
            self.recipe.batch(images[begin:end], labels[begin:end], stream.narrow(begin, end))
            for begin, end in pairwise(bounds)
        ]

    def _capture(self, recorder: Recorder) -> CapturedStep:
        return CapturedStep(self._whole, list(self.parameters.values()), recorder, self.batches.settle)

    def _whole(self, batch: Batch) -> Terms:
        """Attack, forward and backward of a batch that passes whole: what is captured."""
        with self._autocast():
            batch = self.recipe.attack(batch)
        with self._autocast():
            losses = self.recipe(batch)
        torch.autograd.backward(losses["loss"])
        return tuple(losses), torch.stack([value.detach().double() for value in losses.values()])

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

    def _update(self, batches: list[Batch], update: int) -> tuple[Terms, int]:
        """Gradients of one update, over micro-batches that the first one attacks: -> loss terms, and a signal or 0."""
        if (replayed := self._replayed(batches[0])) is not None:
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
                with self._autocast(), self._leavable(stateless or number == 0):
                    batch = batches[number] = self.recipe.attack(batch)
            with without_sync(self.wrapped, last=last):
                with self._autocast(), self._leavable(stateless and safe):
                    losses = self.wrapped(batch, update)
                torch.autograd.backward(losses["loss"] * weight)
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
        asked, number = mean[-2:].tolist()
        return (names, mean[:-2]), round(number / asked) if asked else 0

    def _autocast(self) -> Any:
        return autocast(self.config.training.precision, self.parallel.device)

    def _state(self) -> dict[str, Tensor]:
        """Weights and statistics of what is trained, by name: the very tensors."""
        return {
            f"{name}.{k}": v
            for name in self.recipe.trained
            for k, v in self.recipe.get_submodule(name).state_dict().items()
        }

    @contextmanager
    def _as_kept(self) -> Iterator[None]:
        """Inside, the modules hold what the stage would keep: the running mean where there is one."""
        if not self.mean.tensors:
            yield
            return
        own = {name: value.clone() for name, value in self._state().items()}
        self._load_weights(self.mean.tensors)
        try:
            yield
        finally:
            self._load_weights(own)

    def _must_be_finite(self, terms: dict[str, float], step: int) -> None:
        broken = [name for name, value in terms.items() if name != "loss" and not math.isfinite(value)]
        if broken or not math.isfinite(terms.get("loss", 0.0)):
            raise NonFiniteLoss(
                f"{self.stage.name}: {', '.join(broken) or 'loss'} is not finite at step {step + 1};"
                " lower the learning rate, or set the optimizer's clip"
            )

    def _of(self, module: str) -> list[Tensor]:
        return [p for n, p in self.parameters.items() if n.startswith(f"{module}.")]

    def _weights(self) -> dict[str, Tensor]:
        """Copies in full, on the first worker: all call it together."""
        return gather_full(self._state(), keep=self.parallel.first)

    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name in self.recipe.trained:
            prefix = f"{name}."
            module = self.recipe.get_submodule(name)
            own = module.state_dict()
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            module.load_state_dict({k: shard_like(v, own[k]) if k in own else v for k, v in state.items()})

    def _resume(self) -> int:
        found: Checkpoint | None = None

        def newest() -> str | None:
            nonlocal found
            found = self.checkpoints.latest()
            return None if found is None else found.folder.name

        name = self.parallel.first_does(newest)
        if name is None:
            return 0
        if found is None:
            found = self.checkpoints.at(name)
        self._load_weights(found.tensors["model"])
        self.mean.load(found.tensors.get("ema", {}))
        for module, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, self.parameters, found.tensors[f"optimizer-{module}"])
        self.best, step = found.state["best"], int(found.state["step"])
        self.saved = step
        if self.parallel.first:
            self.record.resend(found.state.get("unsent", []), found.tensors.get("unsent", {}))
            if step < self.steps:
                self.console.say(f"{self.stage.name}: resuming at step {step} of {self.steps}")
        return step

    def _save(self, done: int, judged: bool = False) -> None:
        """Copy the state and let the writer commit it; all workers call it together."""
        if done == self.saved and not judged:
            return
        self._read_all()
        began = time.monotonic()
        names: dict[Tensor, str] = {p: n for n, p in self.parameters.items()}
        groups = {"model": self._weights()}
        if self.mean.tensors:
            groups["ema"] = gather_full(self.mean.tensors, keep=self.parallel.first)
        for module, optimizer in self.optimizers.items():
            groups[f"optimizer-{module}"] = gather_full(optimizer_tensors(optimizer, names), keep=self.parallel.first)
        if self.writer is not None:
            points, pictures = self.record.unsent()
            tensors = groups | {"unsent": dict(pictures)}
            state = {"stage": self.stage.name, "step": done, "steps": self.steps, "best": self.best, "unsent": points}
            self.writer.put(Save(done, tensors, state, self.new_best))
            self.record.metrics(
                {
                    "checkpoint/blocked_seconds": time.monotonic() - began,
                    "checkpoint/stored_seconds": self.writer.seconds,
                },
                done,
            )
        self.new_best, self.saved = None, done

    def _judge(self, done: int) -> None:
        deployed = self.recipe.deployed()
        if deployed is None:
            return
        self._read_all()
        with self._as_kept():
            natural, robust = held_out_accuracy(deployed, self.held_out, self.config, self.parallel)
            if self.best is None or robust > self.best["robust"]:
                folder = f"best-{done:08d}" if self.stage.keep == "best" else None
                facts = {"step": done, "natural": natural, "robust": robust, "folder": folder}
                if folder is not None:
                    weights = self._weights()
                    self.new_best = (folder, weights, facts) if self.parallel.first else None
                self.best = facts
        self.best = {**self.best, "last": {"step": done, "natural": natural, "robust": robust}}
        if self.parallel.first:
            self.record.metrics({"held_out/natural": natural, "held_out/robust": robust}, done)

    def _picture(self, done: int) -> None:
        deployed = self.recipe.deployed()
        if isinstance(deployed, Defended) and (self.parallel.first or accumulates(self.wrapped)):  # shards go together
            with self._as_kept():
                grid = restoration_grid(deployed, self.held_out, self.config, self.parallel.device)
            if not self.parallel.first:
                return
            self.record.picture("restored", to_pixels(grid), done)

    def _log(self, done: int, terms: dict[str, float], window: int, seconds: float) -> None:
        speed = window * self.config.training.batch_size / max(seconds, 1e-9)
        rates = {f"lr/{name}": o.param_groups[0]["lr"] for name, o in self.optimizers.items()}
        losses = {f"loss/{name}" if name != "loss" else "loss/total": value for name, value in terms.items()}
        self.record.metrics({**losses, **rates, "images_per_second": speed}, done)
        left = (self.steps - done) * self.config.training.batch_size / speed
        epoch = min(self.stage.epochs, 1 + (done - 1) // self.loader.steps_per_epoch)
        stored = (self.writer.step, self.writer.seconds) if self.writer is not None else (0, 0.0)
        stage, held_out = self.stage, self.best["last"] if self.best else {}
        status = Status(stage.name, epoch, stage.epochs, done, self.steps, terms, speed, left, *stored, held_out)
        self.console.show(status)
