"""How sure a measured accuracy is."""

from __future__ import annotations

import math

Z95 = 1.959963984540054
"""Half-width of a normal distribution's central 95 %, in deviations."""


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927), as shares in [0, 1]. Raises ValueError when empty."""
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"need 0 <= correct <= total and total > 0, got {correct} of {total}")
    share, spread = correct / total, Z95**2 / total
    center = (share + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))
