"""Numbers of the DIR paper (Zhou et al., ICML 2023) by table, in percent: those of the presets, and those of none."""

from __future__ import annotations

from collections.abc import Mapping

from dircluster.presets import apegan, dir, ebm, hgd, jatp, menet, nrp
from dircluster.presets.base import NO_DEFENSE

Row = Mapping[str, float]
TABLE_1: dict[str, dict[str, Row]] = {
    data: {
        "identity": NO_DEFENSE[data],
        "apegan": apegan.PRINTED[data]["apegan"],
        "hgd": hgd.PRINTED[data]["hgd"],
        "nrp": nrp.PRINTED[data]["nrp"],
        "jatp": jatp.PRINTED[data]["jatp"],
        "dir": dir.PRINTED[data]["dir"],
    }
    for data in ("cifar10", "svhn")
}
"""By data set and system, and with them what Section 4.2 prints of other attacks."""
TABLE_2 = {
    "trades": {
        "identity": (82.67, 49.59, 46.63),
        "apegan": (82.14, 31.70, 13.59),
        "hgd": (82.37, 23.49, 14.63),
        "nrp": (82.23, 27.65, 14.90),
        "jatp": (82.61, 48.13, 44.46),
        "dir": (82.53, 55.43, 51.72),
    },
    "mart": {
        "identity": (81.93, 50.65, 48.12),
        "apegan": (81.69, 33.67, 14.24),
        "hgd": (81.64, 25.01, 15.17),
        "nrp": (81.70, 29.34, 16.91),
        "jatp": (81.85, 48.30, 45.16),
        "dir": (81.76, 56.04, 52.23),
    },
}
"""CIFAR-10, by the target's objective: natural, PGD, AutoAttack."""
TABLE_3 = {
    "menet": menet.PRINTED["cifar10"]["natural"],
    "menet_a": menet.PRINTED["cifar10"]["at"],
    "ebm": ebm.PRINTED["cifar10"],
    "dir": dir.PRINTED["cifar10"]["dir"]["bpda40"],
}
"""CIFAR-10: BPDA with EOT, PGD-40."""
TABLE_4 = {"hgd": (20.57, 291_000.0), "jatp": (27.06, 349_000.0), "dir": (39.12, 527_000.0)}
"""CIFAR-10, natural target: accuracy, and milliseconds an epoch."""
NO_PRETRAINING = (47.21, 1.1)
"""Section 4.3: accuracy under PGD, and the time of training in units of that with pre-training."""
