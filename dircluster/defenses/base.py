"""A purifier g, and the defended pipeline h(g(x)) as one module: images in [0, 1] in, logits out."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks.expectation import straight_through
from dircluster.config import ConfigError, first_line
from dircluster.models.modules import device_of, evaluating

MOST_DRAWS = 1 << 16
"""Draws over which a view averages at most: the rows of a pass are as many times the images."""


@dataclass(frozen=True)
class AdaptiveAttack:
    """PGD that knows a purifier: a row of suites ``paper`` and ``rigorous``, beside those that every defense meets."""

    name: str
    """What tables call it, before its steps and draws."""
    gradient: Literal["exact", "identity"]
    """What passes back through the purifier: its own gradient, or the identity (BPDA)."""
    steps: int
    step: float | None = None
    """Size of a step in parts of epsilon; that of the evaluation's other attacks when not given."""
    eot: int | None = None
    """Draws whose gradients are averaged at each step; the suite's when not given."""


class Purifier(nn.Module):
    """g: images (N, C, H, W) in [0, 1] -> purified images (N, C, H, W), not clamped: a clamp hides gradients."""

    forward_methods: tuple[str, ...] = ()
    """Methods besides ``forward`` that pass images through the weights."""
    adaptive: tuple[AdaptiveAttack, ...] = ()
    """Attacks that know it, which an evaluation adds to its suite."""
    replicates: int | None = None
    """Purifications of an image whose logits are averaged into one prediction, where there are several: a row of
    :meth:`draw` is then (replicates, ...), and ``forward`` goes by the first of them."""
    image_shape: tuple[int, int, int] | None = None
    """Channels, height and width of the only images that its network takes; None where it takes any."""
    reads_whole = False
    """Whether autocast in bf16 rounds no image in it, although no layer of models.precision keeps it from that."""
    recompute = False
    """Whether activations are computed again in the backward pass instead of being kept, where the network can."""

    def draw(self, generator: torch.Generator, images: int) -> Tensor | None:
        """The randomness of a pass as one row an image, (images, ...), on the CPU; None where nothing is random."""
        return None

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(N, C, H, W), the rows of :meth:`draw` -> (N, C, H, W)."""
        raise NotImplementedError

    def visible(self, images: Tensor, draws: Tensor | None) -> Iterable[Tensor]:
        """What the purifier sees of images, a picture of each view (N, C, H, W); nothing where it sees them whole."""
        return ()

    @property
    def passes(self) -> int:
        """Passes of an image through the network."""
        return 1

    @property
    def randomized(self) -> bool:
        """Whether a pass draws anything."""
        return self.draw(torch.Generator(), 1) is not None


class Defended(nn.Module):
    """h(g(x)) for any purifier. A new module draws afresh at every call.

    :meth:`fresh`, :meth:`fixed` and :meth:`averaged` give views of it that draw otherwise: modules of their own with
    the same weights and submodules. They change nothing of the module that they are asked of. ``draws`` > 1 averages
    the logits over so many draws.
    """

    def __init__(self, purifier: Purifier, classifier: nn.Module, name: str = "defense") -> None:
        super().__init__()
        self.purifier = purifier
        self.classifier = classifier
        self.name = name
        """What tables call it."""
        self.image_shape: tuple[int, int, int] | None = None
        """Channels, height and width that it was trained on, where they are known."""
        self.settings: dict[str, Any] | None = None
        """The sections that decided its networks, as plain data; None where they are not known."""
        self.draws = 1
        self._seed: int | None = None
        self._known: list[Tensor | None] = []
        """The fixed draws, made once: a trace or an export of the module then holds them as constants."""
        self._reseed()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not self._seeded:  # a copy must not draw what its original draws
            self._reseed()

    def _reseed(self) -> None:
        """Draw from a stream of this process's own, seeded from the system."""
        self._seeded, self._process = False, os.getpid()
        self._generator = torch.Generator()
        self._generator.seed()

    def fresh(self, seed: int | None = None, draws: int = 1) -> Defended:
        """A view that draws at each call, from a generator of its own, seeded from the system without ``seed``.

        Without one, copies and forked workers draw each from a stream of their own; with one, all draw the same.
        Raises ConfigError where ``seed`` is no whole number.
        """
        view = self._view(None, draws)
        if seed is not None:
            view._generator, view._seeded = rng.generator(_seed(seed), "fresh_masks"), True
        return view

    def fixed(self, seed: int, draws: int = 1) -> Defended:
        """A view with the same draw for every image and call: what an attacker faces who knows it.

        Raises ConfigError unless ``seed`` is a whole number.
        """
        return self._view(_seed(seed), draws)

    def averaged(self, draws: int) -> Defended:
        """A view whose logits are means over so many draws; they are fixed where this module's are.

        Where this one draws from a seed, the view goes on from where it has got to; else from a stream of its own.
        """
        view = self._view(self._seed, draws)
        if self._seeded:
            view._generator.set_state(self._generator.get_state())
            view._seeded = True
        return view

    def _view(self, seed: int | None, draws: int) -> Defended:
        """Raises ConfigError unless ``draws`` is a number from 1 to MOST_DRAWS."""
        if not _is_whole(draws) or not 1 <= draws <= MOST_DRAWS:
            raise ConfigError(f"draws must be a whole number from 1 to {MOST_DRAWS}, got {draws!r}")
        view = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):  # what is registered with a view, such as a hook, is the view's
                vars(view)[name] = value.copy()
        view._reseed()
        view._seed, view.draws = seed, draws
        view._known = [] if seed is None else [view._fixed_draw(number) for number in range(draws)]
        return view

    @property
    def is_fixed(self) -> bool:
        """Whether every call uses the same draw."""
        return self._seed is not None

    def draw(self, images: int, number: int = 0) -> Tensor | None:
        """The draw of the next call, one row an image, on the CPU; the fixed ones are counted by ``number``."""
        if self._seed is None:
            if torch.compiler.is_compiling():  # a graph has a stream of its own
                return torch.compiler.disable(self._fresh_draw)(images)  # type: ignore[no-any-return, no-untyped-call]
            return self._fresh_draw(images)
        drawn = self._known[number] if number < len(self._known) else self._fixed_draw(number)
        return None if drawn is None else drawn.expand(images, *drawn.shape[1:])

    def _fixed_draw(self, number: int) -> Tensor | None:
        assert self._seed is not None
        with torch.device("cpu"):
            return self.purifier.draw(rng.generator(self._seed, "fixed_masks", step=number), 1)

    def _fresh_draw(self, images: int) -> Tensor | None:
        if not self._seeded and os.getpid() != self._process:
            self._reseed()
        with torch.device("cpu"):
            drawn = self.purifier.draw(self._generator, images)
        traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if drawn is not None and (traced or torch.compiler.is_exporting()):
            raise ConfigError(
                "an export would keep one draw for all calls: export defense.fixed(seed), or give the draws as a second"
                " input, (images, defense.draw(len(images)))"
            )
        return drawn

    def _taken(self, images: Tensor) -> Tensor:
        """``images``. Raises ConfigError unless they are dense floats (N, C, H, W) of the size that is taken."""
        if not isinstance(images, Tensor):
            raise ConfigError(f"images must be a tensor (N, C, H, W), got {type(images).__name__}")
        if images.is_nested:
            raise ConfigError("images must be dense, got a nested tensor: give torch.stack(images.unbind())")
        wanted, found = self.image_shape or self.purifier.image_shape, tuple(images.shape)
        if images.ndim != 4 or (wanted is not None and found[1:] != wanted):
            channels, height, width = wanted or ("C", "H", "W")
            hint = ""
            if found[1:] == (height, width, channels):
                hint = ": channels come first, images.permute(0, 3, 1, 2)"
            elif found == wanted:
                hint = ": give a batch, images[None]"
            raise ConfigError(f"images must be (N, {channels}, {height}, {width}), got {found}{hint}")
        if not images.is_floating_point():
            raise ConfigError(f"images must be floats in [0, 1], got {images.dtype}; divide by 255 if they are bytes")
        if images.layout != torch.strided:
            raise ConfigError(f"images must be dense, got {images.layout}: give images.to_dense()")
        if images.device.type == "meta" and device_of(self).type != "meta":
            raise ConfigError("images are on the meta device, which holds no values: give them where the weights are")
        return images

    def restore(self, images: Tensor) -> Tensor:
        """Purified images under the next draw: (N, C, H, W) -> (N, C, H, W), not clamped."""
        images = self._taken(images)
        if images.shape[0] == 0:
            return images
        restored: Tensor = self.purifier(cast(images, self.purifier), _moved(self.draw(images.shape[0]), images))
        return restored

    def logits(self, images: Tensor, draws: Tensor | None, *, bypassed: bool = False) -> Tensor:
        """Logits under given draws, one row an image, averaged over the purifier's replicates.

        (N, C, H, W), (N, ...) -> (N, classes). ``bypassed``: the identity is the purifier's backward pass (BPDA).
        """
        count, images = self.purifier.replicates, cast(images, self.purifier)
        if count is not None:
            assert draws is not None
            images, draws = images.repeat_interleave(count, dim=0), draws.flatten(0, 1).unsqueeze(1)
        if bypassed:
            with torch.no_grad():
                purified = self.purifier(images, draws)
            purified = straight_through(images, purified)
        else:
            purified = self.purifier(images, draws)
        logits: Tensor = self.classifier(cast(purified, self.classifier))
        return logits if count is None else logits.view(-1, count, logits.shape[1]).mean(dim=1)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, classes), averaged over ``self.draws`` draws, in the dtype of the weights.

        With ``draws``, rows of :meth:`draw`, one an image, those alone count. Raises ConfigError for images that are
        not dense floats, or not of the size that the defense takes, and for other draws.
        """
        images = self._taken(images)
        count = images.shape[0]
        if count == 0:
            with evaluating(self):  # one image tells the number of classes, and is none that statistics are of
                logits: Tensor = self.fixed(0)(images.new_zeros((1, *images.shape[1:])))
            return logits[:0]
        if draws is not None:
            return self._under(draws, images)
        if self.draws == 1 or not self.purifier.randomized:
            return self.logits(images, _moved(self.draw(count), images))
        drawn = [self.draw(count, number) for number in range(self.draws)]
        rows = torch.cat([one for one in drawn if one is not None])
        repeated = images.repeat(self.draws, 1, 1, 1)
        return self.logits(repeated, _moved(rows, images)).view(self.draws, count, -1).mean(dim=0)

    def _under(self, draws: Tensor, images: Tensor) -> Tensor:
        """Logits under draws from outside. Raises ConfigError unless they are such as :meth:`draw` gives."""
        if not isinstance(draws, Tensor) or draws.ndim == 0 or draws.shape[0] != images.shape[0]:
            found = [*draws.shape, "()"][0] if isinstance(draws, Tensor) else type(draws).__name__
            raise ConfigError(f"draws must be one row an image, got {found} for {images.shape[0]} images")
        traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if traced or torch.compiler.is_compiling():
            return self.logits(images, _moved(draws, images))
        with torch.device("cpu"):
            known = self.purifier.draw(torch.Generator(), 1)
        if known is not None and (draws.dtype, draws.shape[1:]) != (known.dtype, known.shape[1:]):
            wanted, given = ("x".join(map(str, each.shape[1:])) for each in (known, draws))
            raise ConfigError(
                f"draws must be rows of {wanted} {known.dtype}, got {given} {draws.dtype}: give"
                " defense.draw(len(images))"
            )
        try:
            return self.logits(images, _moved(draws, images))
        except IndexError as error:
            raise ConfigError(
                f"draws hold what the defense does not draw ({first_line(error)}): give defense.draw(len(images))"
            ) from error


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _seed(seed: int) -> int:
    """``seed``. Raises ConfigError unless it is a whole number: None would draw afresh."""
    if not _is_whole(seed):
        raise ConfigError(f"seed must be a whole number, got {seed!r}")
    return int(seed)


def _moved(draws: Tensor | None, images: Tensor) -> Tensor | None:
    return None if draws is None else draws.to(images.device)


def cast(images: Tensor, module: nn.Module) -> Tensor:
    """``images`` in the dtype of the module's weights; within autocast, which casts by itself, as they are."""
    kind = images.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return images
    weights = chain(module.parameters(), module.buffers())
    return images.to(next((each.dtype for each in weights if each.is_floating_point()), images.dtype))


def unwrapped(module: Any) -> Any:
    """The defense in what adds nothing to it (DataParallel, torch.compile, a Sequential of one); else ``module``."""
    inner = module
    while not isinstance(inner, Defended):
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif isinstance(inner, nn.Sequential) and len(inner) == 1:
            inner = inner[0]
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            return module
    return inner


@contextmanager
def drawing_from_torch(parts: Iterable[Defended]) -> Iterator[None]:
    """Inside, what ``parts`` draw comes from PyTorch's own stream, as somebody's module must draw that is judged."""
    own = [(part, part._generator, part._seeded) for part in parts]
    try:
        for part, *_ in own:
            part._generator, part._seeded = torch.default_generator, True
        yield
    finally:
        for part, generator, seeded in own:
            part._generator, part._seeded = generator, seeded
