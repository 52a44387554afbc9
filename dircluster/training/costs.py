"""What a step costs: floating-point operations counted on the models themselves, parameters, bytes exchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dircluster.config import RunConfig
from dircluster.models import classifiers
from dircluster.models.denoiser import MaskedDenoiser
from dircluster.training.loop import pieces
from dircluster.training.stages import architecture


@dataclass(frozen=True)
class Costs:
    """Of one image: floating-point operations of a forward pass, a multiply-add counted as two."""

    denoiser_forward: int
    target_forward: int
    denoiser_parameters: int
    target_parameters: int
    denoiser_block_parameters: int
    """Of the denoiser's parameters, those in transformer blocks, which fsdp gathers block by block."""

    def step(self, config: RunConfig, stage: str) -> int:
        """Operations of one global batch in ``stage``; a backward pass to the input counts as one forward pass."""
        attack, target = config.attack.steps, config.target
        g, h = self.denoiser_forward, self.target_forward
        if stage == "target":
            crafting = {"natural": 0, "trades": 1 + 2 * target.trades_steps}.get(target.objective, 2 * attack)
            updates = 3 if target.objective in ("natural", "at") else 6
            image = (crafting + updates) * h
        elif stage == "pretrain":
            image = 2 * attack * h + 2 * 3 * g
        else:
            image = (2 * attack + 3) * g + (2 * attack + 2 * config.dir.perturb_steps + 4) * h
            if config.dir.joint:  # its own reference logits, and two backward passes to the weights
                image += 3 * h
        return image * config.training.batch_size

    def exchanged(self, config: RunConfig, workers: int) -> int:
        """Bytes that each of ``workers`` sends in a step of the DIR stage (frozen target), and receives.

        ddp: the mean of the gradients, reduced in parts and gathered. fsdp: weights for every pass of crafting and
        update, those of blocks again for its backward half, and the gradients reduced in parts. A gathered weight takes
        four bytes, two in bf16 under fsdp; a gradient takes four.
        """
        if workers == 1:
            return 0
        weights = 4 * self.denoiser_parameters
        if config.parallel.strategy == "ddp":
            return 2 * weights * (workers - 1) // workers
        passes = (config.attack.steps + 1) * pieces(config.training.batch_size, workers, config.training.microbatch)
        width = 2 if config.training.precision == "bf16" else 4
        gathered = passes * width * (self.denoiser_parameters + self.denoiser_block_parameters)
        return (gathered + weights) * (workers - 1) // workers


def forward_operations(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Operations of one forward pass, counted operator by operator."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    total: int = counter.get_total_flops()
    return total


def count(config: RunConfig) -> Costs:
    """Costs of the run's models, counted on the meta device: nothing is computed or downloaded."""
    data = config.data
    with torch.device("meta"):
        denoiser = MaskedDenoiser(config.model, data.channels, data.height, data.width)
        classifier = classifiers.build(architecture(config), data)
        image = torch.zeros(1, data.channels, data.height, data.width)
        kept = torch.zeros(config.masking.masks, 1, config.masking.kept(config.tokens), dtype=torch.int64)
    return Costs(
        forward_operations(denoiser.eval(), image, kept),
        forward_operations(classifier.eval(), image),
        _parameters(denoiser),
        _parameters(classifier),
        _parameters(denoiser.encoder) + _parameters(denoiser.decoder),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
