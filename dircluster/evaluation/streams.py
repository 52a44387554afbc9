"""PyTorch's own random streams for somebody's module, apart from everyone else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dircluster import rng


class OwnStreams:
    """PyTorch's streams as a module meets them: seeded, kept from call to call, put back in between."""

    def __init__(self, seed: int, again: bool) -> None:
        self.seed, self.again = seed, again
        self.state: list[Tensor] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Go on where the last call ended, or with ``again`` at the beginning."""
        with rng.put_back() as found:
            for stream in found:
                stream.manual_seed(self.seed)
            if self.state is not None and not self.again:
                for stream, state in zip(found, self.state, strict=False):  # a GPU may have come into use since
                    stream.set_state(state)
            yield
            self.state = [stream.get_state() for stream in found]


def steady(model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """``model`` (N, C, H, W) -> (N, classes), which draws the same at every call where it draws at random."""
    streams = OwnStreams(0, again=True)

    def drawing(images: Tensor) -> Tensor:
        with streams():
            logits: Tensor = model(images)
        return logits

    return drawing
