"""How a run is asked to stop, and how it shows that it lives while it waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from dircluster.training.protocols import Console


class Interrupted(Exception):
    """The run was asked to stop, and has committed a checkpoint."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


@contextmanager
def interruptible(module: nn.Module, console: Console, leave: bool = True) -> Iterator[None]:
    """Raise Interrupted from a pass through ``module`` in eval mode once the console hears a signal.

    Crafting runs in eval mode and changes nothing, so a long attack can be left at any of its steps. Without ``leave``
    the passes only show the console that the run lives.
    """

    def check(module: nn.Module, inputs: object) -> None:
        if not module.training and (signal := console.stop_signal()) and leave:
            raise Interrupted(signal)

    hook = module.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def waiting(console: Console) -> Iterator[None]:
    """Show the console that the run lives while it waits for something that has a time limit of its own."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(2.0):
            console.stop_signal()

    thread = threading.Thread(target=beat, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
