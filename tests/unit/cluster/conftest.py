"""A clock that stands until it is moved, a person's terminal, and actors that are plain objects."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


class Clock:
    """In place of ``time``: sleeping moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.at: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    monotonic = __call__

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for due, call in [planned for planned in self.at if planned[0] <= self.now]:
            self.at.remove((due, call))
            call()

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Do this once it has been slept for so long."""
        self.at.append((self.now + seconds, call))


class Terminal:
    """Notes what is said; asks to stop once ``signal`` is set."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.told: list[Any] = []
        self.signal = 0

    def say(self, line: str) -> None:
        self.said.append(line)

    def tell(self, event: Any) -> None:
        self.told.append(event)

    def show(self, status: Any) -> None:
        self.told.append(status)

    def stop_signal(self) -> int:
        return self.signal


class Actor:
    """An object whose methods are called as those of a Ray actor: ``actor.method.remote(...)``."""

    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.inside, name))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a module another ``ray``, in which remote calls have been answered already: (module, name=value, ...)."""

    def replace(module: Any, **more: Any) -> None:
        monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda value, **_: value, **more))

    return replace
