"""The training loop that every stage runs: steps, held-out selection, checkpoints, resume, interruption."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import OptimizerConfig, RunConfig
from dircluster.data.loader import Loader
from dircluster.data.sources import Split
from dircluster.evaluation.benchmark import held_out_accuracy
from dircluster.evaluation.pictures import restoration_grid, to_pixels
from dircluster.recipes.base import Batch, Recipe
from dircluster.training.checkpoint import Checkpoint, Checkpoints, optimizer_tensors, restore_optimizer
from dircluster.training.parallel import Parallel, without_sync
from dircluster.training.ports import Console, Interrupted, StageRecord, Status, interruptible


class NonFiniteLoss(RuntimeError):
    """A loss term or gradient norm is NaN or infinite; no weight was changed by it."""


@dataclass(frozen=True)
class Stage:
    """What is trained, for how long, and how."""

    name: str
    recipe: Recipe
    epochs: int
    optimizers: dict[str, OptimizerConfig]
    """By the name of the submodule each trains."""
    selects: bool = True
    """Whether the stage ends on its best held-out weights (robust accuracy) rather than on its last."""


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where ``training.precision`` asks for it, or is auto on a GPU."""
    precision = config.training.precision
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class Trainer:
    """Trains one stage from wherever its checkpoints left off."""

    def __init__(
        self,
        stage: Stage,
        loader: Loader,
        held_out: Split,
        config: RunConfig,
        parallel: Parallel,
        checkpoints: Checkpoints,
        record: StageRecord,
        console: Console,
    ) -> None:
        self.stage, self.recipe = stage, stage.recipe
        self.loader, self.held_out, self.config, self.parallel = loader, held_out, config, parallel
        self.checkpoints, self.record, self.console = checkpoints, record, console
        self.steps = stage.epochs * loader.steps_per_epoch
        self.wrapped = parallel.wrap(stage.recipe)
        self.parameters = {n: p for n, p in stage.recipe.named_parameters() if p.requires_grad}
        self.optimizers = {name: _optimizer(self._of(name), knobs) for name, knobs in stage.optimizers.items()}
        self.best: dict[str, Any] | None = None
        self.saved = -1

    def run(self) -> dict[str, Any] | None:
        """Train to the end; the recipe then holds the stage's result. -> what is known of its best weights.

        Raises Interrupted after committing a checkpoint, and NonFiniteLoss on all workers before the update.
        """
        window, since = 0, time.monotonic()
        start = self._resume()
        if self._selects_after(start) and (self.best is None or self.best["last"]["step"] != start):
            self._judge_or_save(start)
        for step in range(start, self.steps):
            done = step + 1
            terms, signal = self._step_or_save(step)
            window += 1
            epoch, inside = divmod(done, self.loader.steps_per_epoch)
            last = done == self.steps
            if self.parallel.first and (done % self.config.tracking.log_every == 0 or last):
                self._log(done, terms, window, time.monotonic() - since)
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
        self.parallel.wait()
        if self.best is not None and self.best["folder"] is not None:
            self._load_weights(self.checkpoints.at(self.best["folder"]).tensors["model"])
        return self.best

    def _selects_after(self, done: int) -> bool:
        epoch, inside = divmod(done, self.loader.steps_per_epoch)
        return done > 0 and inside == 0 and (epoch % self.config.training.select_every == 0 or done == self.steps)

    def _judge_or_save(self, done: int) -> None:
        """Held-out selection; where a signal ends it, it is made up for on resume."""
        try:
            with self._leavable():
                self._judge(done)
        except Interrupted:
            self._save(done)
            raise

    def _step_or_save(self, step: int) -> tuple[dict[str, float], int]:
        """:meth:`step`, or a checkpoint of what was before it where a signal ends it halfway."""
        try:
            return self.step(step)
        except Interrupted:
            self._save(step)
            raise

    def _leavable(self, safe: bool = True) -> AbstractContextManager[None]:
        """Where a single worker may leave at once when it hears a signal; several have to agree on a step."""
        if self.parallel.world > 1 or not safe:
            return nullcontext()
        return interruptible(self.recipe.get_submodule("classifier"), self.console)

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """One update: -> loss terms averaged over the global batch, and the signal that asks to stop (or 0)."""
        epoch, index = divmod(step, self.loader.steps_per_epoch)
        images, labels, stream = self.loader(epoch, index)
        self.recipe.train()
        for name, optimizer in self.optimizers.items():
            rate = self.stage.optimizers[name].rate((step + 1) / self.loader.steps_per_epoch, self.stage.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        names: tuple[str, ...] = ()
        total: Tensor | None = None
        share = self.config.training.microbatch or len(labels)
        stateless = not any(True for name in self.recipe.trained for _ in self.recipe.get_submodule(name).buffers())
        with rng.ambient(self.config.seed, f"{self.stage.name}/ambient", epoch, index):
            for begin in range(0, len(labels), share):
                end = min(begin + share, len(labels))
                rows, weight = slice(begin, end), (end - begin) / len(labels)
                batch = Batch(images[rows], labels[rows], stream.narrow(begin, end))
                # A step can be left as long as it has changed no running statistics.
                with autocast(self.config, self.parallel.device), self._leavable(stateless or begin == 0):
                    batch = self.recipe.craft(batch)
                with without_sync(self.wrapped, last=end == len(labels)):
                    with autocast(self.config, self.parallel.device), self._leavable(stateless):
                        losses = self.wrapped(batch)
                    torch.autograd.backward(losses["loss"] * weight)
                names = tuple(losses)
                part = torch.stack([value.detach().double() for value in losses.values()]) * weight
                total = part if total is None else total + part
        assert total is not None
        signal = self.console.stop_signal()
        flags = torch.tensor([float(signal > 0), float(signal)], dtype=torch.float64, device=total.device)
        *values, asked, number = self.parallel.mean(torch.cat([total, flags])).tolist()
        terms = dict(zip(names, values, strict=True))
        self._must_be_finite(terms, step)
        for name in self.optimizers:
            clip = self.stage.optimizers[name].clip
            if clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(self._of(name), clip)
                self._must_be_finite({f"gradient norm of {name}": float(norm)}, step)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return terms, round(number / asked) if asked else 0

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
        return {
            f"{name}.{k}": v
            for name in self.recipe.trained
            for k, v in self.recipe.get_submodule(name).state_dict().items()
        }

    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        for name in self.recipe.trained:
            prefix = f"{name}."
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            self.recipe.get_submodule(name).load_state_dict(state)

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
        for module, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, self.parameters, found.tensors[f"optimizer-{module}"])
        self.best, step = found.state["best"], int(found.state["step"])
        self.saved = step
        if self.parallel.first and step < self.steps:
            self.console.say(f"{self.stage.name}: resuming at step {step} of {self.steps}")
        return step

    def _save(self, done: int) -> None:
        if done == self.saved:
            return
        if self.parallel.first:
            tensors: dict[str, dict[str, Tensor]] = {"model": self._weights()}
            names: dict[Tensor, str] = {p: n for n, p in self.parameters.items()}
            for module, optimizer in self.optimizers.items():
                tensors[f"optimizer-{module}"] = optimizer_tensors(optimizer, names)
            state = {"stage": self.stage.name, "step": done, "steps": self.steps, "best": self.best}
            self.checkpoints.save(done, tensors, state)
        self.saved = done

    def _judge(self, done: int) -> None:
        natural, robust = held_out_accuracy(self.recipe, self.held_out, self.config, self.parallel)
        if self.best is None or robust > self.best["robust"]:
            folder = f"best-{done:08d}" if self.stage.selects else None
            facts = {"step": done, "natural": natural, "robust": robust, "folder": folder}
            if self.parallel.first and folder is not None:
                self.checkpoints.save_at(folder, {"model": self._weights()}, {"best": facts})
            self.best = facts
        self.best = {**self.best, "last": {"step": done, "natural": natural, "robust": robust}}
        if self.parallel.first:
            self.record.metrics({"held_out/natural": natural, "held_out/robust": robust}, done)

    def _picture(self, done: int) -> None:
        if self.parallel.first and self.recipe.restores:
            grid = restoration_grid(self.recipe, self.held_out, self.config, self.parallel.device)
            self.record.picture("restored", to_pixels(grid), done)

    def _log(self, done: int, terms: dict[str, float], window: int, seconds: float) -> None:
        speed = window * self.config.training.batch_size / max(seconds, 1e-9)
        rates = {f"lr/{name}": o.param_groups[0]["lr"] for name, o in self.optimizers.items()}
        losses = {f"loss/{name}" if name != "loss" else "loss/total": value for name, value in terms.items()}
        self.record.metrics({**losses, **rates, "images_per_second": speed}, done)
        left = (self.steps - done) * self.config.training.batch_size / speed
        epoch = min(self.stage.epochs, 1 + (done - 1) // self.loader.steps_per_epoch)
        self.console.show(Status(self.stage.name, epoch, self.stage.epochs, done, self.steps, terms, speed, left))


def _optimizer(parameters: list[Tensor], knobs: OptimizerConfig) -> torch.optim.Optimizer:
    if knobs.name == "sgd":
        return torch.optim.SGD(parameters, lr=knobs.lr, momentum=knobs.momentum, weight_decay=knobs.weight_decay)
    betas = (knobs.momentum, knobs.beta2)
    return torch.optim.AdamW(parameters, lr=knobs.lr, betas=betas, weight_decay=knobs.weight_decay)
