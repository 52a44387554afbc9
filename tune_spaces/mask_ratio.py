"""Section 4.3: the share of the patches that each mask discards."""

GRID = {"masking.ratio": [0.3, 0.5, 0.7]}
SEARCH = {"masking.ratio": (0.2, 0.75)}
