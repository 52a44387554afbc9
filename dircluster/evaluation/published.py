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


def published(dataset: str, row: Mapping[str, Any]) -> float | None:
    """What the paper prints for a row of a table on ``dataset``, None where it prints nothing."""
    return PUBLISHED.get(dataset, {}).get(row["defense"], {}).get(str(row["attack"]).split("-eot")[0])
