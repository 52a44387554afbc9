"""A step's attack, forward and backward as one CUDA graph: recorded once, replayed on inputs that stay where they are.

A step launches some thousand kernels, which a slow host does not launch as fast as a GPU runs them. What is recorded
must launch the same work each time. Clipping and the optimizers' updates stay outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dircluster.config import ConfigError, RunConfig, first_line
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.distributed.parallel import Parallel

WARM_UP = 3
"""Steps that are made before one is recorded: libraries choose their kernels and memory in the first ones."""
KNOWN = ("torch", "timm", __name__.partition(".")[0])
"""Packages whose passes launch the same work each time; of others' code nobody knows."""

Terms = tuple[tuple[str, ...], Tensor]
"""Names of loss terms, and their values (n,) float64."""


class Recorder(Protocol):
    """What records work on a device and replays it."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do ``work`` as it will be done while it is recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work`` without doing it: -> what does it again, on the same tensors."""


class GraphRecorder:
    """Records CUDA graphs, on a stream of their own: the default one cannot be recorded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self, work: Callable[[], None]) -> None:
        """``work`` on the stream that is recorded later: libraries keep memory for each."""
        here = torch.cuda.current_stream(self.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            work()
        here.wait_stream(self.side)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of ``work``. Autograd's thread launches some of it, and others may use the GPU meanwhile."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        here = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, pool, self.side, capture_error_mode="thread_local"):
                work()
        except RuntimeError:
            self._leave(here, pool)
            raise
        return graph.replay

    def _leave(self, here: torch.cuda.Stream, pool: Any) -> None:
        """Go on after a broken recording. PyTorch 2.11 leaves its stream the current one, and its memory being
        recorded, so that nothing is freed which two streams have used. It leaves the device's random stream in a state
        of recording too, in which drawing from it (dropout) raises: it gets a state of its own.
        """
        torch.cuda.set_stream(here)
        with contextlib.suppress(RuntimeError):  # later ones have done so
            torch._C._cuda_endAllocateToPool(self.device.index or 0, pool)
        drawn = torch.cuda.default_generators[self.device.index or 0]
        sound = torch.Generator(self.device)
        sound.set_state(drawn.get_state())
        drawn.graphsafe_set_state(sound)


class CaptureError(RuntimeError):
    """The work cannot be recorded: it waits for the device, say, or copies from pageable memory."""


class CapturedStep:
    """``work`` on a batch, from its first :data:`WARM_UP` calls on as a recording.

    ``work`` attacks, passes forward and backward, and adds to the gradients of ``parameters``, which are zeroed first
    and stay where they are: dropped ones would leave the recording with memory that nobody reads. ``settle`` is called
    before anything is recorded.
    """

    def __init__(
        self,
        work: Callable[[Batch], Terms],
        parameters: Sequence[Tensor],
        recorder: Recorder,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._work, self._parameters, self._recorder, self._settle = work, parameters, recorder, settle
        self._calls, self._keeps = 0, True
        self._inputs: Batch | None = None
        self._terms: Terms | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch) -> Terms:
        """Gradients of the batch: -> its loss terms. Raises CaptureError, with nothing done."""
        self._calls += 1
        if self._calls <= WARM_UP:
            self._inputs = batch
            self._recorder.warm_up(self._run)
        elif self._replay is None:
            if not self._keeps:
                raise CaptureError("it drops gradients, and a recording would go on writing to them")
            self._inputs = _map(batch, torch.clone)
            self._settle()
            self._replay = self._recorded()
            self._replay()
        else:
            assert self._inputs is not None
            for static, given in zip(_tensors(self._inputs), _tensors(batch), strict=True):
                static.copy_(given, non_blocking=True)
            self._replay()
        assert self._terms is not None
        names, values = self._terms
        return names, values.clone()  # the next replay writes over them

    def _recorded(self) -> Callable[[], None]:
        try:
            return self._recorder.record(self._run)
        except RuntimeError as error:
            cause = error.__context__ or error  # ending a broken recording fails too
            raise CaptureError(first_line(cause)) from error

    def _run(self) -> None:
        gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        if gradients:
            torch._foreach_zero_(list(gradients.values()))
        assert self._inputs is not None
        self._terms = self._work(self._inputs)
        self._keeps = self._keeps and all(p.grad is gradient for p, gradient in gradients.items())


def captured_step(
    config: RunConfig,
    parallel: Parallel,
    recipe: Recipe,
    recorder: Recorder | None,
    make: Callable[[Recorder], CapturedStep],
) -> CapturedStep | None:
    """What ``make`` makes where ``training.capture`` asks for it and it can be had; auto takes known code alone.

    Raises ConfigError where it is on and cannot be had.
    """
    switch = config.training.capture
    if recorder is None and parallel.device.type == "cuda":
        recorder = GraphRecorder(parallel.device)
    obstacle = obstacle_here(config, parallel, recorder is not None) or obstacle_of(recipe)
    if switch == "on" and obstacle:
        raise refusal(obstacle)
    if switch == "off" or obstacle or recorder is None or (switch == "auto" and not _known(recipe)):
        return None
    return make(recorder)


def refusal(obstacle: str) -> ConfigError:
    """What is raised where ``training.capture`` is on and cannot be."""
    return ConfigError(f"training.capture is on, but a step cannot be captured here: {obstacle}; use auto or off")


def obstacle_here(config: RunConfig, parallel: Parallel, recordable: bool) -> str:
    """Why no step of the run can be recorded; empty where nothing stands against it."""
    training = config.training
    found = {
        f"it runs on the {parallel.device.type.upper()}": not recordable,
        f"it is shared by {parallel.world} workers": parallel.world > 1,
        "it passes in micro-batches": (training.microbatch or training.batch_size) < training.batch_size,
        "parallel.activation_checkpointing keeps random states": config.parallel.activation_checkpointing,
    }
    return next((reason for reason, holds in found.items() if holds), "")


def obstacle_of(recipe: Recipe) -> str:
    """Why no step of a recipe can be recorded; empty where nothing stands against it."""
    if len(recipe.updates) > 1:
        return "it has several updates"
    return "" if recipe.capturable else "its passes depend on more than tensors"


def _known(recipe: Recipe) -> bool:
    return all(type(part).__module__.partition(".")[0] in KNOWN for part in recipe.modules())


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.labels, *(batch.draws[name] for name in sorted(batch.draws))]


def _map(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    draws = {name: change(value) for name, value in batch.draws.items()}
    return replace(batch, images=change(batch.images), labels=change(batch.labels), draws=draws)
