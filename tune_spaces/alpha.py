"""Figure 6a: the weight of L_rep in Eq. 7, from 0 (adversarial training of the denoiser alone) to 5."""

GRID = {"dir.alpha": [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]}
SEARCH = {"dir.alpha": (0.0, 5.0)}
