"""What is judged, in the forms that an attacker may face: random draws fixed, new at every pass, or averaged over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dircluster import rng
from dircluster.attacks.expectation import straight_through
from dircluster.attacks.gradient import Model
from dircluster.config import ConfigError
from dircluster.defenses.base import AdaptiveAttack, Defended, cast, unwrapped
from dircluster.evaluation.adapter import Adapted
from dircluster.evaluation.streams import OwnStreams, steady
from dircluster.evaluation.watch import Unwatched, Watch
from dircluster.models.modules import device_of, parts_of

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


class Cast(nn.Module):
    """A classifier whose weights are not float32: (N, C, H, W) in any dtype -> (N, classes) in that of its weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @staticmethod
    def over(classifier: nn.Module) -> nn.Module:
        """``classifier`` as it takes float32: itself where that is what it computes in."""
        whole = {part.dtype for part in parts_of(classifier) if part.is_floating_point()} <= {torch.float32}
        return classifier if whole else Cast(classifier)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(cast(images, self.inner))
        return logits


class VictimModel:
    """A module that takes (N, C, H, W) in [0, 1] and returns (N, classes) logits, whoever trained it.

    A module with ``restore(images)`` and ``classifier(images)`` is a purifier in front of a classifier, which BPDA,
    transfer and the attack of Eq. 9 make use of. What it draws must come from PyTorch's own streams, or from masks.
    It is somebody's: who passes images through it does so within ``under_attack(*subject.modules)``.
    """

    def __init__(self, module: Callable[..., Any], name: str, surrogate: Callable[..., Any] | None = None) -> None:
        """Raises ConfigError for a defense at fixed or averaged draws, and for what is no function of images."""
        module = unwrapped(module)
        if isinstance(module, Defended) and (module.draws != 1 or module.is_fixed):
            raise ConfigError(
                "the defense stands at fixed draws or averaged logits; give it with fresh draws (defense.fresh())"
            )
        self.module: Defended | Adapted = module if isinstance(module, Defended) else _adapted(module, "the defense")
        self.name = name
        self.watch: Watch | Unwatched = Unwatched()
        """Sees what passes between an attack and its model, see :meth:`watched_by`."""
        self.notes: list[str] = []
        """What a report says of how the module was taken, a line each."""
        self.drawn = isinstance(module, Defended) and module.purifier.randomized
        """Whether its randomness is rows that the attacker may know, hold fixed and pass side by side."""
        self.masked = self.drawn and isinstance(self._defense.purifier, Masked)
        """Whether it sees images through masks, which the attack of Eq. 8 makes use of."""
        given = module.inner if isinstance(module, Adapted) else module
        restore, classifier = getattr(given, "restore", None), getattr(given, "classifier", None)
        self.target: Model | None = None
        """The classifier behind the purifier."""
        if callable(classifier) and callable(restore):
            self.target = Cast.over(classifier) if isinstance(module, Defended) else self._part(classifier)
        self.surrogate = None if surrogate is None else _adapted(surrogate, "the surrogate")
        self.source: Model | None = self.target if self.surrogate is None else steady(self.surrogate)
        """What an attacker without access crafts on: ``surrogate``, or the purifier's own classifier."""
        self.modules: tuple[nn.Module, ...] = tuple(m for m in (self.module, self.surrogate) if m is not None)
        self.randomized = self.drawn

    @property
    def apart(self) -> bool:
        """Whether draws of an image pass one after another: somebody's module may draw once for a whole pass."""
        return self.randomized and not self.drawn

    @property
    def offers(self) -> frozenset[str]:
        """What attacks may need, see attack_table.Attack."""
        has = (("purifier", self.target is not None), ("masks", self.masked))
        return frozenset(name for name, there in has if there)

    def watched_by(self, watch: Watch) -> VictimModel:
        """The same victim, whose models ``watch`` sees."""
        seen = copy.copy(self)
        seen.watch = watch
        seen.target = None if self.target is None else watch.over(self.target)
        seen.source = None if self.source is None else watch.over(self.source)
        return seen

    def model(self, randomness: str, seed: int, draws: int = 1, images: int = 1, most_rows: int | None = None) -> Model:
        """Images -> logits: under draws that are ``fixed`` and known by ``seed``, or ``fresh`` at every pass.

        A purifier's fixed draws are those of ``images`` images, which must then pass together, or one for all.
        With ``draws`` > 1 the logits are averaged over so many fresh draws, ``most_rows`` rows at a time.
        """
        run = self._runner(randomness, seed, images)
        if draws == 1:
            return self.watch.over(lambda batch: run(self._logits, batch))

        def averaged(batch: Tensor) -> Tensor:
            at_once = draws if most_rows is None else max(1, min(draws, most_rows // max(1, len(batch))))
            at_once = 1 if self.apart else at_once
            total = torch.zeros((), device=batch.device)
            for first in range(0, draws, at_once):
                total = total + run(self._summed(min(at_once, draws - first)), batch)
            return total / draws

        return self.watch.over(averaged)

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
        run, module = self._runner(randomness, seed, images), self.module
        classifier = None if isinstance(module, Defended) else self._classifier()

        def part(batch: Tensor, draws: Tensor | None) -> Tensor:
            if classifier is None:
                return self._defense.logits(batch, draws, bypassed=True)
            return classifier(straight_through(batch, self._restore(batch, None)))

        return self.watch.over(lambda batch: run(part, batch))

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
        defense, masked = self._defense, self._masked
        target = Cast.over(defense.classifier)
        return self.watch.over(lambda x: target(masked.restore_each(cast(x, defense.purifier), kept).mean(dim=0)))(
            images
        )

    def pixel_masks(self, kept: Tensor) -> Tensor:
        """Masks (K, N, n) as images of ones and zeros, (K, N, 1, H, W)."""
        return self._masked.pixel_masks(kept)

    def views(self, images: Tensor, seed: int) -> list[Tensor]:
        """What the purifier sees of images (N, C, H, W) under the fixed draw of ``seed``, the one that ``model`` and
        ``restorer`` have for all of them: a picture of each view.
        """
        if not isinstance(self.module, Defended):
            return []
        drawn = self._draws("fixed", seed, 1)[1] if self.drawn else None
        rows = None if drawn is None else drawn.expand(len(images), *drawn.shape[1:])
        return list(self.module.purifier.visible(images, rows))

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

    def _part(self, classifier: Callable[..., Any]) -> Adapted:
        assert isinstance(self.module, Adapted)
        return Adapted(classifier, "its classifier", self.module.place)

    def _logits(self, images: Tensor, draws: Tensor | None) -> Tensor:
        """(N, C, H, W) in [0, 1], one row of draws an image -> (N, classes)."""
        logits: Tensor = self.module(images) if draws is None else self._defense.logits(images, draws)
        return logits

    def _restore(self, images: Tensor, draws: Tensor | None) -> Tensor:
        """(N, C, H, W) in [0, 1], one row of draws an image -> (N, C, H, W)."""
        module: Any = self.module
        if isinstance(module, Adapted):
            return module.answer(module.inner.restore, images)  # type: ignore[attr-defined]
        if draws is None:
            return module.restore(images)  # type: ignore[no-any-return]
        restored: Tensor = module.purifier(cast(images, module.purifier), draws)
        return restored

    def _runner(self, randomness: str, seed: int, known_images: int = 1) -> Runner:
        if not self.drawn:
            stream = OwnStreams(seed, again=randomness == "fixed")

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
        """One row for each of so many images, (images, ...)."""
        drawn = self._defense.purifier.draw(generator, images)
        assert drawn is not None
        return drawn


def _adapted(module: Any, called: str) -> Adapted:
    return module if isinstance(module, Adapted) else Adapted(module, called)
