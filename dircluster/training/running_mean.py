"""A running mean of weights and statistics (EMA): what a stage validates and keeps where it asks for one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMean:
    """The mean by the names of what it follows; without a decay it holds nothing and does nothing."""

    def __init__(self, decay: float | None, state: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.tensors = {} if decay is None else {name: value.clone() for name, value in state.items()}

    @torch.no_grad()
    def follow(self, state: Mapping[str, Tensor], step: int) -> None:
        """Move toward ``state`` after ``step``: faster in the first steps, so that it forgets where it began."""
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        moved = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.tensors[name] for name in moved], [state[name] for name in moved], 1 - decay)
        for name in state.keys() - set(moved):  # counters
            self.tensors[name].copy_(state[name])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self.tensors = {name: tensors[name].to(value.device) for name, value in self.tensors.items()}
