"""Weight of L_rep, mask ratio and depth together: 27 points, or a search over all of them."""

GRID = {
    "dir.alpha": [0.5, 2.0, 5.0],
    "masking.ratio": [0.3, 0.5, 0.7],
    "model.encoder_depth": [4, 8, 12],
}
SEARCH = {
    "dir.alpha": (0.0, 5.0),
    "masking.ratio": (0.2, 0.75),
    "model.encoder_depth": (1, 12),
    "model.decoder_depth": (1, 4),
}
