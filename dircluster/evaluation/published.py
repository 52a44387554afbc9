"""Numbers that Zhou et al. (ICML 2023) print, in percent, by the names that our tables give the attacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dircluster.config import RunConfig, flatten
from dircluster.presets import preset

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

RATIOS = {0.3: (87.34, 49.63), 0.7: (77.68, 50.16)}
"""Section 4.3, CIFAR-10: natural and under PGD-20, by mask ratio."""
DEPTHS = {
    (4, 1): (84.2, 48.23),
    (4, 2): (84.21, 49.97),
    (6, 1): (84.25, 52.01),
    (6, 2): (84.27, 52.63),
    (12, 4): (85.37, 54.32),
}
"""Table 5, CIFAR-10: the same by blocks of encoder and decoder."""


def published_ablation(run: RunConfig) -> tuple[float, float] | None:
    """Natural accuracy and that under PGD-20 that the paper prints for a run of DIR; None where it prints none.

    Seed, evaluation and where the data comes from may be any; all else must be the preset's but for what was ablated.
    """
    if run.data.name not in PUBLISHED:
        return None
    usual, own = _decisive(preset(run.data.name)), _decisive(run)
    changed = {name for name, value in own.items() if usual[name] != value}
    if not changed:
        whole = PUBLISHED[run.data.name]["dir"]
        return whole["natural"], whole["pgd20"]
    if run.data.name == "cifar10" and changed == {"masking.ratio"}:
        return RATIOS.get(run.masking.ratio)
    if run.data.name == "cifar10" and changed <= {"model.encoder_depth", "model.decoder_depth"}:
        return DEPTHS.get((run.model.encoder_depth, run.model.decoder_depth))
    return None


def _decisive(run: RunConfig) -> dict[str, Any]:
    free = ("seed", "data.uri", "data.stream")
    flat = flatten(run.identity)
    return {n: value for n, value in flat.items() if n not in free and not n.startswith("evaluation.")}


def published(dataset: str, row: Mapping[str, Any]) -> float | None:
    """What the paper prints for a row of a table on ``dataset``, None where it prints nothing."""
    return PUBLISHED.get(dataset, {}).get(row["defense"], {}).get(str(row["attack"]).split("-eot")[0])
