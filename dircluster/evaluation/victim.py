"""What is judged, in the forms that an attacker may face: random draws fixed, new at every pass, or averaged over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dircluster import rng
from dircluster.attacks.expectation import straight_through
from dircluster.attacks.gradient import Model
from dircluster.config import ConfigError, named_line
from dircluster.defenses.base import AdaptiveAttack, Defended
from dircluster.models.modules import device_of, evaluating

Part = Callable[[Tensor, Tensor | None], Tensor]
"""Images (N, C, H, W), what a purifier draws (N, ...) or None -> what is asked of the defense."""
Runner = Callable[[Part, Tensor], Tensor]
"""Runs a part on images under random draws of its own."""


@runtime_checkable
class Masked(Protocol):
    """A purifier that sees images through masks, as the attack of Eq. 8 needs to know it."""

    def masks(self, draws: Tensor) -> Tensor:
        """Kept patches of each mask: draws (N, ...) -> (K, N, n)."""

    def restore_each(self, images: Tensor, kept: Tensor) -> Tensor:
        """Images purified through each mask: (N, C, H, W), (K, N, n) -> (K, N, C, H, W)."""

    def pixel_masks(self, kept: Tensor) -> Tensor:
        """Masks (K, N, n) as images of ones and zeros, (K, N, 1, H, W)."""


class VictimModel:
    """A module that takes (N, C, H, W) in [0, 1] and returns (N, classes) logits, whoever trained it.

    A module with ``restore(images)`` and ``classifier(images)`` is a purifier in front of a classifier, which BPDA,
    transfer and the attack of Eq. 9 make use of. What it draws must come from PyTorch's own streams, or from masks.
    It is somebody's: who passes images through it does so within ``under_attack(*subject.modules)``.
    """

    def __init__(self, module: nn.Module, name: str, surrogate: nn.Module | None = None) -> None:
        if isinstance(module, Defended) and (module.draws != 1 or module.is_fixed):
            raise ConfigError(
                "the defense stands at fixed draws or averaged logits; give it with fresh draws (defense.fresh())"
            )
        self.module, self.name = module, name
        self.drawn = isinstance(module, Defended) and module.purifier.randomized
        """Whether its randomness is rows that the attacker may know, hold fixed and pass side by side."""
        self.masked = self.drawn and isinstance(self._defense.purifier, Masked)
        """Whether it sees images through masks, which the attack of Eq. 8 makes use of."""
        restore, classifier = getattr(module, "restore", None), getattr(module, "classifier", None)
        self.target: Model | None = classifier if callable(classifier) and callable(restore) else None
        self.source: Model | None = self.target if surrogate is None else surrogate
        """What an attacker without access crafts on: ``surrogate``, or the purifier's own classifier."""
        self.modules = (module,) if surrogate is None else (module, surrogate)
        has = (("purifier", self.target is not None), ("masks", self.masked))
        self.offers = frozenset(name for name, there in has if there)
        """What attacks may need, see attack_table.Attack."""
        self.randomized = self.drawn

    def meet(self, images: Tensor, highest: int, classes: int | None = None) -> None:
        """See a few images, (n, C, H, W), and learn whether the module draws at random.

        Raises ConfigError where the logits are not what they must be for labels up to ``highest``.
        """
        with evaluating(*self.modules), torch.no_grad():
            self._meet(images, highest, classes)

    def _meet(self, images: Tensor, highest: int, classes: int | None) -> None:
        try:
            run = self._runner("fresh", 0)
            first, second = run(self._logits, images), run(self._logits, images)
        except Exception as error:  # whatever somebody's module says of images that it was not made for
            raise ConfigError(
                f"the defense cannot take images of shape {tuple(images.shape[1:])}: {named_line(error)}"
            ) from error
        if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != len(images) or first.shape[1] < 2:
            shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ConfigError(f"the defense must return logits (N, classes) for {len(images)} images, got {shape}")
        if not first.isfinite().all():
            raise ConfigError("the defense returns values that are not finite (NaN or infinity)")
        found = first.shape[1]
        if classes is not None and found != classes:
            raise ConfigError(f"the defense gives {found} classes, but the data has {classes}")
        if highest >= found:
            raise ConfigError(f"labels reach {highest}, but the defense gives {found} classes")
        sums = first.double().sum(dim=1)
        if first.min() >= 0 and (sums - 1).abs().max() < 1e-4:
            raise ConfigError("the defense returns probabilities; return logits (what comes before the softmax)")
        self.randomized = self.drawn or not torch.allclose(first, second, rtol=1e-4, atol=1e-5)
        once, again = self.model("fixed", 1)(images), self.model("fixed", 1)(images)
        if not torch.allclose(once, again, rtol=1e-4, atol=1e-5):
            raise ConfigError(
                "the defense draws from a random stream of its own: let it draw from PyTorch's, so that what an"
                " attacker knows can be held fixed"
            )

    def model(self, randomness: str, seed: int, draws: int = 1, images: int = 1, most_rows: int | None = None) -> Model:
        """Images -> logits: under draws that are ``fixed`` and known by ``seed``, or ``fresh`` at every pass.

        A purifier's fixed draws are those of ``images`` images, which must then pass together, or one for all.
        With ``draws`` > 1 the logits are averaged over so many fresh draws, ``most_rows`` rows at a time.
        """
        run = self._runner(randomness, seed, images)
        if draws == 1:
            return lambda batch: run(self._logits, batch)

        def averaged(batch: Tensor) -> Tensor:
            at_once = draws if most_rows is None or not self.drawn else max(1, min(draws, most_rows // len(batch)))
            total = torch.zeros((), device=batch.device)
            for first in range(0, draws, at_once):
                total = total + run(self._summed(min(at_once, draws - first)), batch)
            return total / draws

        return averaged

    def _summed(self, count: int) -> Part:
        """Logits summed over ``count`` passes side by side; what draws computes them again for the backward pass."""

        def part(batch: Tensor, draws: Tensor | None) -> Tensor:
            def passed(candidates: Tensor) -> Tensor:
                logits = self._logits(candidates.repeat(count, 1, 1, 1), draws)
                return logits.view(count, len(candidates), -1).sum(dim=0)

            if draws is None or not torch.is_grad_enabled():
                return passed(batch)
            recomputed: Tensor = checkpoint(passed, batch, use_reentrant=False)
            return recomputed

        part.rows = count  # type: ignore[attr-defined]
        return part

    def bypassed(self, randomness: str, seed: int, images: int = 1) -> Model:
        """Images -> logits, the purifier's backward pass replaced by the identity (BPDA)."""
        run, classifier = self._runner(randomness, seed, images), self._classifier()

        def part(batch: Tensor, draws: Tensor | None) -> Tensor:
            if draws is not None:
                return self._defense.logits(batch, draws, bypassed=True)
            return classifier(straight_through(batch, self._restore(batch, None)))

        return lambda batch: run(part, batch)

    def restorer(self, randomness: str, seed: int, images: int = 1) -> Callable[[Tensor], Tensor]:
        """Images -> restored images."""
        run = self._runner(randomness, seed, images)
        return lambda batch: run(self._restore, batch)

    def masks(self, form: str, seed: int, images: int) -> Callable[[], Tensor]:
        """Masks (K, N, n) as the attacker of Eq. 8 meets them: the same or new ones at each call."""
        generator, fixed = self._draws(form, seed, images)
        device = device_of(self._defense)
        return lambda: self._masked.masks(fixed if fixed is not None else self._draw(generator, images)).to(device)

    def logits_under(self, images: Tensor, kept: Tensor) -> Tensor:
        """Logits through given masks: (N, C, H, W), (K, N, n) -> (N, classes)."""
        logits: Tensor = self._defense.classifier(self._masked.restore_each(images, kept).mean(dim=0))
        return logits

    def pixel_masks(self, kept: Tensor) -> Tensor:
        """Masks (K, N, n) as images of ones and zeros, (K, N, 1, H, W)."""
        return self._masked.pixel_masks(kept)

    def views(self, images: Tensor, seed: int) -> list[Tensor]:
        """What the purifier sees of images (N, C, H, W) under the fixed draws of ``seed``, a picture of each view."""
        if not isinstance(self.module, Defended):
            return []
        drawn = self._draws("fixed", seed, len(images))[1] if self.drawn else None
        return list(self.module.purifier.visible(images, drawn))

    @property
    def passes(self) -> int:
        """Passes of an image through the purifier's network, as far as it is known; 1 for anybody's module."""
        return self.module.purifier.passes if isinstance(self.module, Defended) else 1

    @property
    def adaptive(self) -> tuple[AdaptiveAttack, ...]:
        """Attacks that know its purifier; none for anybody's module."""
        return self.module.purifier.adaptive if isinstance(self.module, Defended) else ()

    @property
    def _defense(self) -> Defended:
        assert isinstance(self.module, Defended)
        return self.module

    @property
    def _masked(self) -> Masked:
        purifier = self._defense.purifier
        assert isinstance(purifier, Masked)
        return purifier

    def _classifier(self) -> Model:
        if self.target is None:
            raise ConfigError(f"{self.name} has no classifier(images) behind a restore(images)")
        return self.target

    def _logits(self, images: Tensor, draws: Tensor | None) -> Tensor:
        logits: Tensor = self.module(images) if draws is None else self._defense.logits(images, draws)
        return logits

    def _restore(self, images: Tensor, draws: Tensor | None) -> Tensor:
        module: Any = self.module
        restored: Tensor = module.restore(images) if draws is None else module.purifier(images, draws)
        return restored

    def _runner(self, randomness: str, seed: int, known_images: int = 1) -> Runner:
        if not self.drawn:
            stream = _Stream(seed, again=randomness == "fixed")

            def run(part: Part, images: Tensor) -> Tensor:
                with stream():
                    return part(images, None)

            return run
        generator, fixed = self._draws(randomness, seed, known_images)

        def run_drawn(part: Part, images: Tensor) -> Tensor:
            rows = len(images) * getattr(part, "rows", 1)
            draws = self._draw(generator, rows) if fixed is None else fixed
            return part(images, (draws.expand(rows, *draws.shape[1:]) if len(draws) == 1 else draws).to(images.device))

        return run_drawn

    def _draws(self, form: str, seed: int, images: int) -> tuple[torch.Generator, Tensor | None]:
        generator = rng.generator(seed, f"{form}_masks")
        return generator, self._draw(generator, images) if form == "fixed" else None

    def _draw(self, generator: torch.Generator, images: int) -> Tensor:
        drawn = self._defense.purifier.draw(generator, images)
        assert drawn is not None
        return drawn


class _Stream:
    """PyTorch's own random streams for somebody's module: seeded, kept from call to call, apart from everyone's."""

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


def check_images(images: Tensor, labels: Tensor) -> None:
    """Raise ConfigError unless these are float images (N, C, H, W) in [0, 1] with labels (N,) from 0."""
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise ConfigError("images and labels must be tensors")
    if images.ndim != 4:
        raise ConfigError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
    if len(images) == 0:
        raise ConfigError("there are no images to judge")
    if not images.is_floating_point():
        raise ConfigError(f"images must be floats in [0, 1], got {images.dtype}; divide by 255")
    if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise ConfigError(f"images must lie in [0, 1], got {images.min():g} to {images.max():g}")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ConfigError(f"labels must be {len(images)} whole numbers, got {labels.dtype} {tuple(labels.shape)}")
    if int(labels.min()) < 0:
        raise ConfigError(f"labels must be 0 or more, got {int(labels.min())}")
