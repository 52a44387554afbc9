"""Numbers that Zhou et al. (ICML 2023) print, in percent, by the names that our tables give the attacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TABLE_1 = ("natural", "pgd20", "autoattack-standard", "mifgsm20", "vnifgsm20")
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "none": dict(zip(TABLE_1, (85.2, 45.72, 42.26, 47.43, 47.39), strict=True)),
        "dir": {
            **dict(zip(TABLE_1, (85.11, 54.27, 51.34, 55.62, 55.57), strict=True)),
            "masked40": 53.68,  # Eq. 8
            "bpda40": 52.09,  # Table 3, with EOT
            "restored20-from-natural": 42.16,  # Eq. 9
        },
    },
    "svhn": {
        "none": dict(zip(TABLE_1, (91.27, 50.83, 45.16, 51.9, 51.85), strict=True)),
        "dir": dict(zip(TABLE_1, (90.79, 55.3, 51.61, 56.7, 56.64), strict=True)),
    },
}

ABLATIONS: dict[str, dict[tuple[tuple[str, Any], ...], tuple[float, float]]] = {
    "cifar10": {
        **{
            (("masking.ratio", ratio),): printed  # Section 4.3
            for ratio, printed in ((0.3, (87.34, 49.63)), (0.5, (85.11, 54.27)), (0.7, (77.68, 50.16)))
        },
        **{
            (("model.encoder_depth", encoder), ("model.decoder_depth", decoder)): printed  # Table 5
            for encoder, decoder, printed in (
                (4, 1, (84.2, 48.23)),
                (4, 2, (84.21, 49.97)),
                (6, 1, (84.25, 52.01)),
                (6, 2, (84.27, 52.63)),
                (8, 2, (85.11, 54.27)),
                (12, 4, (85.37, 54.32)),
            )
        },
    }
}


def published_ablation(dataset: str, settings: Mapping[str, Any]) -> tuple[float, float] | None:
    """Natural accuracy and that under PGD-20 that the paper prints where only ``settings`` differ from it, or None."""
    return ABLATIONS.get(dataset, {}).get(tuple(settings.items()))


def published(dataset: str, row: Mapping[str, Any]) -> float | None:
    """What the paper prints for a row of a table on ``dataset``, None where it prints nothing."""
    return PUBLISHED.get(dataset, {}).get(row["defense"], {}).get(str(row["attack"]).split("-eot")[0])
