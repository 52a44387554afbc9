"""The training loop that every stage runs: held-out selection, checkpoints, resume, interruption between steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dircluster.config import ConfigError, RunConfig
from dircluster.data.loader import Loader
from dircluster.data.split import Split
from dircluster.data.stream import StreamLoader
from dircluster.defenses.base import Defended
from dircluster.defenses.recipe import Recipe
from dircluster.defenses.stage import Stage
from dircluster.distributed.parallel import Parallel, accumulates, gather_full, shard_like
from dircluster.evaluation.pictures import to_pixels
from dircluster.training.capture import Recorder
from dircluster.training.checkpoint import Checkpoint, Checkpoints
from dircluster.training.checkpoint_writer import CheckpointWriter, Save
from dircluster.training.interrupt import Interrupted, waiting
from dircluster.training.optim import optimizer_tensors, restore_optimizer
from dircluster.training.protocols import Console, StageRecord, Status
from dircluster.training.step import NonFiniteLoss, Reading, Stepper
from dircluster.training.validation import GAUGED, held_out_accuracy, overfitting, restoration_grid

OVERFITTED = 0.15
"""How far the gauge of catastrophic overfitting may go before the log warns."""
INTERRUPTED_PATIENCE = 20.0
"""Seconds that an interrupted run takes to commit its checkpoint."""


MOST_UNREAD = 32
"""Steps whose loss terms may wait on their device until they are read."""


class Trainer(Stepper):
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
        super().__init__(stage, recipe, loader, config, parallel, console, recorder)
        self.held_out, self.checkpoints, self.record = held_out, checkpoints, record
        self.unread: list[Reading] = []
        self.validates = recipe.deployed() is not None
        self.best: dict[str, Any] | None = None
        self.new_best: tuple[str, dict[str, Tensor], dict[str, Any]] | None = None
        self.saved, self.begun_at = -1, 0
        self.writer = CheckpointWriter(checkpoints, console.say) if parallel.first else None

    def run(self) -> dict[str, Any] | None:
        """Train to the end; the recipe then holds the stage's result. -> what is known of its best weights.

        Raises Interrupted after committing a checkpoint, NonFiniteLoss on all workers before the update, and
        StoppedError where storage took no checkpoint for ``storage.patience`` seconds at the end. Where storage
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
        start = self._resume()
        if self._selects_after(start) and (self.best is None or self.best["last"]["step"] != start):
            self._judge_or_save(start)
            if self._pictures_after(start):
                self._picture(start)
            if start == self.steps:
                self._save(start, judged=True)
        window, since = 0, time.monotonic()
        for step in range(start, self.steps):
            done = step + 1
            reading, signal = self._step_or_save(step)
            self.unread.append(reading)
            window += 1
            last = done == self.steps
            logs = self.parallel.first and (done % self.config.tracking.log_every == 0 or last)
            if logs or len(self.unread) >= MOST_UNREAD:
                self._read_all()
            if logs:
                self._log(done, self._read(reading), window, time.monotonic() - since)
                window, since = 0, time.monotonic()
            began = time.monotonic()
            if self._selects_after(done):
                self._judge_or_save(done, signal)
            if self._pictures_after(done):
                self._picture(done)
            if signal or done % self.config.storage.checkpoint_every == 0 or last:
                self._save(done)
            since += time.monotonic() - began
            if signal:
                raise Interrupted(signal)

    def _selects_after(self, done: int) -> bool:
        return self.validates and self._is_due(done, self.config.training.select_every)

    def _pictures_after(self, done: int) -> bool:
        return self._is_due(done, self.config.tracking.picture_every)

    def _is_due(self, done: int, every: int) -> bool:
        """Whether so many epochs end after ``done`` steps, or the stage does."""
        epoch, inside = divmod(done, self.loader.steps_per_epoch)
        return done > 0 and inside == 0 and (epoch % every == 0 or done == self.steps)

    def _judge_or_save(self, done: int, signal: int = 0) -> None:
        """Held-out selection; where a signal comes before its end, it is made up for on resume, and so is the picture
        after it.
        """
        if signal:
            self._save(done)
            raise Interrupted(signal)
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

    def _read_all(self) -> None:
        """Find out whether all steps so far were sound: before anything of them is recorded, judged or stored."""
        unread, self.unread = self.unread, []
        for reading in unread:
            self._read(reading)

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

        def newest() -> tuple[str, dict[str, Any] | None] | None:
            nonlocal found
            found = self.checkpoints.latest()
            return None if found is None else (found.folder.name, found.state["best"])

        begun = self.parallel.first_does(newest)
        if begun is None:
            return 0
        name, self.best = begun  # as the first worker found it: the best weights may be damaged
        if found is None:
            found = self.checkpoints.at(name)
        self._load_weights(found.tensors["model"])
        self.mean.load(found.tensors.get("ema", {}))
        for module, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, self.parameters, found.tensors[f"optimizer-{module}"])
        step = int(found.state["step"])
        self.saved = self.begun_at = step
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
        curves: dict[str, float] = {}
        with self._as_kept():
            if self.recipe.attacks_deployed:
                few = min(GAUGED, self.config.training.select_images)
                gap = overfitting(self.recipe, deployed, self.held_out, self.config, self.parallel, few)
                curves["held_out/overfitting"] = gap
                self._warn(gap)
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
            self.record.metrics({"held_out/natural": natural, "held_out/robust": robust, **curves}, done)

    def _warn(self, gap: float) -> None:
        if gap > OVERFITTED and self.parallel.first:
            self.console.say(
                f"{self.stage.name}: held-out accuracy under the training attack lies {100 * gap:.0f} points above that"
                " under PGD-20: catastrophic overfitting, or too weak an attack; craft by pgd, in more steps, on labels"
            )

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
