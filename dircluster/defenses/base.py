"""A purifier g, and the defended pipeline h(g(x)) as one module: images in [0, 1] in, logits out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks.expectation import straight_through


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
        self.settings: dict[str, Any] = {}
        """The sections that decided its networks, as plain data, where they are known."""
        self.draws = 1
        self._seed: int | None = None
        self._generator = torch.Generator()
        self._generator.seed()

    def fresh(self, seed: int | None = None, draws: int = 1) -> Defended:
        """A view that draws at each call, from a generator of its own, seeded from the system without ``seed``."""
        view = self._view(None, draws)
        if seed is None:
            view._generator.seed()
        else:
            view._generator = rng.generator(seed, "fresh_masks")
        return view

    def fixed(self, seed: int, draws: int = 1) -> Defended:
        """A view with the same draw for every image and call: what an attacker faces who knows it."""
        return self._view(seed, draws)

    def averaged(self, draws: int) -> Defended:
        """A view whose logits are means over so many draws; they are fixed where this module's are."""
        view = self._view(self._seed, draws)
        view._generator.set_state(self._generator.get_state())
        return view

    def _view(self, seed: int | None, draws: int) -> Defended:
        view = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):  # what is registered with a view, such as a hook, is the view's
                vars(view)[name] = value.copy()
        view._seed, view.draws, view._generator = seed, draws, torch.Generator()
        return view

    @property
    def is_fixed(self) -> bool:
        """Whether every call uses the same draw."""
        return self._seed is not None

    def draw(self, images: int, number: int = 0) -> Tensor | None:
        """The draw of the next call, one row an image, on the CPU; the fixed ones are counted by ``number``."""
        if self._seed is None:
            return self.purifier.draw(self._generator, images)
        drawn = self.purifier.draw(rng.generator(self._seed, "fixed_masks", step=number), 1)
        return None if drawn is None else drawn.expand(images, *drawn.shape[1:])

    def restore(self, images: Tensor) -> Tensor:
        """Purified images under the next draw: (N, C, H, W) -> (N, C, H, W), not clamped."""
        restored: Tensor = self.purifier(images, _moved(self.draw(len(images)), images))
        return restored

    def logits(self, images: Tensor, draws: Tensor | None, *, bypassed: bool = False) -> Tensor:
        """Logits under given draws, one row an image, averaged over the purifier's replicates.

        (N, C, H, W), (N, ...) -> (N, classes). ``bypassed``: the identity is the purifier's backward pass (BPDA).
        """
        count = self.purifier.replicates
        if count is not None:
            assert draws is not None
            images, draws = images.repeat_interleave(count, dim=0), draws.flatten(0, 1).unsqueeze(1)
        if bypassed:
            with torch.no_grad():
                purified = self.purifier(images, draws)
            purified = straight_through(images, purified)
        else:
            purified = self.purifier(images, draws)
        logits: Tensor = self.classifier(purified)
        return logits if count is None else logits.view(-1, count, logits.shape[1]).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, classes), averaged over ``draws`` draws."""
        if self.draws == 1 or not self.purifier.randomized:
            return self.logits(images, _moved(self.draw(len(images)), images))
        drawn = [self.draw(len(images), number) for number in range(self.draws)]
        rows = torch.cat([one for one in drawn if one is not None])
        repeated = images.repeat(self.draws, 1, 1, 1)
        return self.logits(repeated, _moved(rows, images)).view(self.draws, len(images), -1).mean(dim=0)


def _moved(draws: Tensor | None, images: Tensor) -> Tensor | None:
    return None if draws is None else draws.to(images.device)
