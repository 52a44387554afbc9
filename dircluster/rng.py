"""Randomness as an argument: (seed, purpose, epoch, step) -> generator.

A draw is made for the global batch on the CPU and each worker takes its rows, so that masks, noise and order are the
same for any number of workers and devices, and a resumed run continues the very stream it left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def entropy(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> int:
    """A seed of 63 bits that is a function of the arguments alone."""
    text = f"{seed}/{purpose}/{epoch}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> torch.Generator:
    """A CPU generator whose stream is a function of its arguments alone."""
    return torch.Generator().manual_seed(entropy(seed, purpose, epoch, step))


def streams() -> list[torch.Generator]:
    """The streams that library code draws from: PyTorch's own on the CPU, and on each GPU once one is in use."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.default_generator, *(torch.cuda.default_generators if in_use else ())]


@contextmanager
def put_back() -> Iterator[list[torch.Generator]]:
    """Yield PyTorch's own streams, and put all of them back afterwards, whoever seeds them or draws meanwhile."""
    found = streams()
    states = [stream.get_state() for stream in found]
    try:
        yield found
    finally:
        for stream, state in zip(found, states, strict=True):
            stream.set_state(state)


@contextmanager
def seeded_torch_rng(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> Iterator[None]:
    """Seed what library code draws from PyTorch's own streams (initial weights, dropout), and put them back.

    Those of GPUs are seeded too: dropout draws on the device that its input lies on.
    """
    with put_back() as found:
        for stream in found:
            stream.manual_seed(entropy(seed, purpose, epoch, step))
        yield


def placed(drawn: Tensor, device: torch.device) -> Tensor:
    """What was made on the CPU on ``device``; nobody waits for the copy to a GPU, which leaves from pinned memory."""
    return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)


@dataclass(frozen=True)
class Stream:
    """The draws of one step: made for ``batch`` images, handed out for ``rows`` of them on ``device``."""

    seed: int
    epoch: int
    step: int
    batch: int
    rows: slice
    device: torch.device
    prefix: str = ""

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1): -> (rows, *shape)."""
        drawn = torch.rand((self.batch, *shape), generator=self._generator(purpose))
        return placed(drawn[self.rows], self.device)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal: -> (rows, *shape)."""
        drawn = torch.randn((self.batch, *shape), generator=self._generator(purpose))
        return placed(drawn[self.rows], self.device)

    def sample(self, purpose: str, draw: Callable[[torch.Generator, int], Tensor | None]) -> Tensor | None:
        """What ``draw`` makes from a generator for so many images, one row an image: -> (rows, ...), or its None."""
        drawn = draw(self._generator(purpose), self.batch)
        return None if drawn is None else placed(drawn[self.rows], self.device)

    def narrow(self, start: int, stop: int) -> Stream:
        """The same draws for the local rows ``start`` to ``stop`` alone."""
        first = self.rows.start
        return replace(self, rows=slice(first + start, first + stop))

    def _generator(self, purpose: str) -> torch.Generator:
        return generator(self.seed, f"{self.prefix}/{purpose}", self.epoch, self.step)


@dataclass(frozen=True)
class ImageStream(Stream):
    """The draws of images by number, each image's from streams of its own.

    What an image draws depends neither on its batch nor on the worker that judges it.
    """

    images: tuple[int, ...] = ()

    def narrow(self, start: int, stop: int) -> ImageStream:
        return replace(self, rows=slice(0, stop - start), images=self.images[start:stop])

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        drawn = [torch.rand(shape, generator=one, dtype=torch.float64) for one in self._generators(purpose)]
        return placed(torch.stack(drawn).float(), self.device)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return placed(
            torch.stack([torch.randn(shape, generator=one) for one in self._generators(purpose)]), self.device
        )

    def sample(self, purpose: str, draw: Callable[[torch.Generator, int], Tensor | None]) -> Tensor | None:
        drawn = [one for one in (draw(each, 1) for each in self._generators(purpose)) if one is not None]
        return placed(torch.cat(drawn), self.device) if drawn else None

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [generator(self.seed, f"{self.prefix}/{purpose}", step=number) for number in self.images]
