"""Whether weights that somebody gives can be those of a network at work."""

from __future__ import annotations

from torch import nn

from dircluster.config import ConfigError

WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
"""Layers that give the same for all inputs where their weights are zero."""


def check_weights(module: nn.Module, source: str) -> None:
    """Raise ConfigError where a tensor of ``module``, from ``source``, has NaN or infinity, or a layer only zeros."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ConfigError(f"{source} cannot be used: {name!r} holds numbers that are not finite (NaN or infinity)")
    for name, layer in module.named_modules():
        if isinstance(layer, WEIGHTED) and not bool(layer.weight.any()):
            raise ConfigError(f"{source} cannot be used: the weights of {name!r} are all zero")
