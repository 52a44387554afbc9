"""The control without a purifier, g(x) = x: what a purifier in front of the same target has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dircluster.config import HOW_TRAINED, RunConfig
from dircluster.presets import base
from dircluster.presets.base import NO_DEFENSE, as_one_of, with_smoke_twins
from dircluster.presets.compared import as_svhn


@dataclass(frozen=True)
class IdentityRun(RunConfig):
    """The target of the other systems behind nothing, judged as they are."""

    defense: ClassVar[str] = "identity"
    unread: ClassVar[tuple[str, ...]] = HOW_TRAINED

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        if not as_one_of(self, cifar10_identity(), svhn_identity()):
            return {}
        return dict.fromkeys(("none", "identity"), NO_DEFENSE[self.data.name])


def digits_identity() -> IdentityRun:
    """The target of ``digits`` behind nothing.

    ``python jobs/train.py digits_identity`` costs what the target and an evaluation do, and measures the target.
    """
    return base.digits(IdentityRun, name="digits_identity")


def cifar10_identity() -> IdentityRun:
    """The target of ``cifar10`` behind nothing.

    ``python jobs/train.py cifar10_identity`` costs what the target and an evaluation do. Its accuracy has not been
    measured yet; the DIR paper prints 85.20 % natural and 45.72 % under PGD-20 (CIFAR-10, Table 1).
    """
    return base.cifar10(IdentityRun, name="cifar10_identity")


def cifar10_small_identity() -> IdentityRun:
    """The target of ``cifar10_small`` behind nothing.

    ``python jobs/train.py cifar10_small_identity`` costs what the target and an evaluation do: 60.2 % natural and
    31.3 % under MALT (``zoo:cifar10-small-at``, first 1,000 test images).
    """
    return base.cifar10_small(IdentityRun, name="cifar10_small_identity")


def svhn_identity() -> IdentityRun:
    """The target of ``svhn`` behind nothing.

    ``python jobs/train.py svhn_identity`` costs what the target and an evaluation do. Its accuracy has not been
    measured yet; the DIR paper prints 91.27 % natural and 50.83 % under PGD-20 (SVHN, Table 1).
    """
    return as_svhn(cifar10_identity())


PRESETS = with_smoke_twins((digits_identity, cifar10_identity, cifar10_small_identity, svhn_identity), lambda run: run)
