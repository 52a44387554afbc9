"""Batches with all of their randomness, made one step ahead of the step that needs them.

A batch is a function of (seed, epoch, step), so whoever makes it makes the same. On a GPU a thread draws on the CPU,
copies from pinned memory and augments on a stream of its own, while the step before it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from dircluster.config import TrainingConfig
from dircluster.defenses.recipe import Batch

Made = tuple[list[Batch], torch.cuda.Event | None]
"""A step's micro-batches, and what a GPU's stream has to wait for before it reads them."""


def is_ahead(training: TrainingConfig, device: torch.device) -> bool:
    """Whether batches are made ahead: where asked for, and by themselves on a GPU."""
    return training.draws_ahead == "on" or (training.draws_ahead == "auto" and device.type == "cuda")


class Batches:
    """A step's micro-batches by its number, of ``steps``; ``make`` makes them, with ``ahead`` on a thread."""

    def __init__(self, make: Callable[[int], list[Batch]], steps: int, device: torch.device, ahead: bool) -> None:
        self._make, self._steps, self._device = make, steps, device
        self._pool = ThreadPoolExecutor(1, "batches") if ahead else None
        gpu = ahead and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if gpu else None  # type: ignore[no-untyped-call]
        self._next: tuple[int, Future[Made]] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """The batches of ``step``. Raises what making them raised, wherever that was."""
        if self._pool is None:
            return self._make(step)
        ahead, self._next = self._next, None
        made = ahead[1] if ahead and ahead[0] == step else self._pool.submit(self._made, step)
        batches, ready = made.result()
        if step + 1 < self._steps:
            self._next = (step + 1, self._pool.submit(self._made, step + 1))
        if ready is not None:
            self._hand_over(batches, ready)
        return batches

    def settle(self) -> None:
        """Until nothing is being made."""
        if self._next is not None:
            wait([self._next[1]])

    def close(self) -> None:
        """End the thread; what is asked for later is made in place."""
        pool, self._pool, self._next = self._pool, None, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _made(self, step: int) -> Made:
        if self._stream is None:
            return self._make(step), None
        with torch.cuda.stream(self._stream):
            batches = self._make(step)
            return batches, self._stream.record_event()

    def _hand_over(self, batches: list[Batch], ready: torch.cuda.Event) -> None:
        """Let this thread's stream wait for the batches, and their memory for this stream."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        for batch in batches:
            for tensor in (batch.images, batch.labels, *batch.draws.values()):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
