"""Table 5: blocks of the encoder and of the decoder, in the paper's six pairs."""

GRID = [
    {"model.encoder_depth": 4, "model.decoder_depth": 1},
    {"model.encoder_depth": 4, "model.decoder_depth": 2},
    {"model.encoder_depth": 6, "model.decoder_depth": 1},
    {"model.encoder_depth": 6, "model.decoder_depth": 2},
    {"model.encoder_depth": 8, "model.decoder_depth": 2},
    {"model.encoder_depth": 12, "model.decoder_depth": 4},
]
SEARCH = {"model.encoder_depth": (1, 12), "model.decoder_depth": (1, 4)}
