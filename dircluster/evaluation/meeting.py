"""A first look at a module, before anything expensive: does it answer as a defense must, and can it be attacked?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dircluster.attacks.gradient import Model, cross_entropy, value_and_grad
from dircluster.config import ConfigError, named_line
from dircluster.evaluation.adapter import Adapted
from dircluster.evaluation.streams import OwnStreams
from dircluster.evaluation.victim import VictimModel
from dircluster.models.classifiers import are_probabilities
from dircluster.models.modules import evaluating


def meet(victim: VictimModel, images: Tensor, highest: int, classes: int | None = None) -> None:
    """Show ``victim`` a few images (n, C, H, W): it learns its ``notes``, and whether it is ``randomized``.

    It loses its ``target`` where the module's restore and classifier are not what these names say, or the classifier
    draws at random: no row of it alone knows such draws. Raises ConfigError where the logits are not what they must be
    for labels up to ``highest``, or no gradient can be asked for.
    """
    victim.notes = []
    with evaluating(*victim.modules), torch.no_grad():
        logits = _see(victim, images, highest, classes)
        if isinstance(victim.module, Adapted):
            _see_somebodys(victim, victim.module, images, logits)
        if victim.target is not None and not _alike(victim.target(images), victim.target(images)):
            _lose_target(victim, "the classifier draws at random: it is judged behind the purifier alone")
        if victim.surrogate is not None:
            _see_surrogate(victim.surrogate, images, logits.shape[1])
            victim.notes += victim.surrogate.notes


def _see(victim: VictimModel, images: Tensor, highest: int, classes: int | None) -> Tensor:
    """The logits under fixed draws, (n, classes)."""
    with _taking("the defense", images):
        if isinstance(victim.module, Adapted):
            with OwnStreams(0, again=True)():
                victim.module.fit(images)
        model = victim.model("fresh", 0)
        first, second = model(images), model(images)
    _check_logits("the defense", first, len(images))
    found = first.shape[1]
    if not first.isfinite().all():
        raise ConfigError("the defense returns values that are not finite (NaN or infinity)")
    if classes is not None and found != classes:
        raise ConfigError(f"the defense gives {found} classes, but the data has {classes}")
    if highest >= found:
        raise ConfigError(f"labels reach {highest}, but the defense gives {found} classes")
    _check_no_probabilities("the defense", first)
    once, again = victim.model("fixed", 1)(images), victim.model("fixed", 1)(images)
    if not _alike(once, again):
        raise ConfigError(
            "the defense draws from a random stream of its own: let it draw from PyTorch's, so that what an"
            " attacker knows can be held fixed"
        )
    seeded = victim.model("fixed", 2)(images)  # some draw once a seed, so that two calls are alike
    victim.randomized = victim.drawn or not (_alike(first, second) and _alike(once, seeded))
    return once


def _see_somebodys(victim: VictimModel, module: Adapted, images: Tensor, logits: Tensor) -> None:
    """What would fail in the middle of an attack: other numbers of images, a gradient, a purifier's parts."""
    model = victim.model("fixed", 1)
    for some in (images[:1], images.repeat(3, 1, 1, 1)):
        try:
            model(some)
        except Exception as error:
            raise ConfigError(
                f"the defense takes {len(images)} images, but not {len(some)} (export it with a batch of any size):"
                f" {named_line(error)}"
            ) from error
    try:
        _ask_gradient(model, images, logits)
    except Exception as error:
        raise ConfigError(f"the defense cannot be differentiated: {named_line(error)}") from error
    victim.notes += module.notes
    if victim.target is not None and not _purifies(victim, images, logits):
        _lose_target(
            victim,
            "restore and classifier are not a purifier and what stands behind it, for classifier(restore(images))"
            " is not what the defense answers: it is judged as a whole alone",
        )


def _lose_target(victim: VictimModel, why: str) -> None:
    victim.notes.append(why)
    victim.source = None if victim.source is victim.target else victim.source
    victim.target = None


def _purifies(victim: VictimModel, images: Tensor, logits: Tensor) -> bool:
    """Whether the module's classifier answers on its restored images what the module answers."""
    assert isinstance(victim.target, Adapted)
    try:
        restored = victim.restorer("fixed", 1)(images)
        victim.target.fit(restored)
        again = victim.bypassed("fixed", 1)(images)
    except Exception:  # whatever somebody's methods of these names do
        return False
    shapes = restored.shape == images.shape and again.shape == logits.shape
    return shapes and (victim.randomized or torch.allclose(again, logits, rtol=1e-2, atol=1e-2))


def _see_surrogate(surrogate: Adapted, images: Tensor, classes: int) -> None:
    with _taking("the surrogate", images):
        surrogate.fit(images)
        logits = surrogate(images)
        _ask_gradient(surrogate, images, logits)
    _check_logits("the surrogate", logits, len(images))
    if logits.shape[1] != classes:
        raise ConfigError(f"the surrogate gives {logits.shape[1]} classes, but the defense {classes}")
    _check_no_probabilities("the surrogate", logits)


@contextmanager
def _taking(called: str, images: Tensor) -> Iterator[None]:
    """Whatever somebody's module says of images that it was not made for, in one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{called} cannot take images of shape {tuple(images.shape[1:])}: {named_line(error)}"
        ) from error


def _ask_gradient(model: Model, images: Tensor, logits: Tensor) -> None:
    value_and_grad(cross_entropy(model, logits.argmax(dim=1)))(images)


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def _check_logits(called: str, logits: Tensor, images: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != images or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"{called} must return logits (N, classes) for {images} images, got {shape}")


def _check_no_probabilities(called: str, logits: Tensor) -> None:
    if are_probabilities(logits):
        raise ConfigError(f"{called} returns probabilities; return logits (what comes before the softmax)")
