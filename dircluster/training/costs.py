"""What a step costs: floating-point operations counted on the step itself, parameters, bytes exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dircluster.config import RunConfig
from dircluster.defenses.recipe import Batch
from dircluster.models import classifiers
from dircluster.models.masked_vit import MaskedDenoiser
from dircluster.rng import Stream
from dircluster.training import stages
from dircluster.training.trainer import pieces

IMAGES = 2
"""That pass together where a step is counted."""


@dataclass(frozen=True)
class Costs:
    """Of one image: floating-point operations of a forward pass, a multiply-add counted as two."""

    denoiser_forward: int
    target_forward: int
    denoiser_parameters: int
    target_parameters: int
    denoiser_block_parameters: int
    """Of the denoiser's parameters, those in transformer blocks, which fsdp gathers block by block."""

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


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations as they run, forward and backward: those of products and convolutions.

    Attention is counted where it runs as the products that it is made of, see :func:`counting`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **given, out_val=out))
        return out


@contextmanager
def counting() -> Iterator[Operations]:
    """Count operations, attention as the plain products that it is made of."""
    with sdpa_kernel(SDPBackend.MATH), Operations() as found:
        yield found


def forward_operations(module: nn.Module, *inputs: torch.Tensor) -> int:
    """Operations of one forward pass, counted operator by operator."""
    with counting() as found, torch.no_grad():
        module(*inputs)
    return found.total


def step_operations(config: RunConfig, stage: str) -> int:
    """Operations of one global batch in ``stage`` (target, pretrain or dir): craft, forward and backward.

    The step itself runs, on two images and the meta device, where nothing is computed: layers of batch statistics need
    two. Where activations are computed again, that counts too.
    """
    denoiser, classifier = _models(config)
    denoiser.recompute = config.parallel.activation_checkpointing
    made = {
        "target": lambda: stages.target_stage(config, classifier),
        "pretrain": lambda: stages.pretrain_stage(config, denoiser, classifier),
        "dir": lambda: stages.dir_stage(config, denoiser, classifier),
    }[stage]()
    recipe = made.recipe.train()
    labels = torch.zeros(IMAGES, dtype=torch.int64, device="meta")
    stream = Stream(config.seed, 0, 0, IMAGES, slice(0, IMAGES), torch.device("meta"))
    with counting() as found:
        losses = recipe(recipe.craft(Batch(_image(config, IMAGES), labels, stream)))
        torch.autograd.backward(losses["loss"])
    return found.total * config.training.batch_size // IMAGES


def _models(config: RunConfig) -> tuple[MaskedDenoiser, nn.Module]:
    """The run's models on the meta device: without weights."""
    data = config.data
    with torch.device("meta"):
        denoiser = MaskedDenoiser(config.model, data.channels, data.height, data.width)
        return denoiser, classifiers.build(stages.architecture(config), data)


def _image(config: RunConfig, images: int) -> torch.Tensor:
    data = config.data
    return torch.zeros(images, data.channels, data.height, data.width, device="meta")


def count(config: RunConfig) -> Costs:
    """Costs of the run's models, counted on the meta device: nothing is computed or downloaded."""
    denoiser, classifier = _models(config)
    shape = (config.masking.masks, 1, config.masking.kept(config.tokens))
    image, kept = _image(config, 1), torch.zeros(shape, dtype=torch.int64, device="meta")
    return Costs(
        forward_operations(denoiser.eval(), image, kept),
        forward_operations(classifier.eval(), image),
        _parameters(denoiser),
        _parameters(classifier),
        _parameters(denoiser.encoder) + _parameters(denoiser.decoder),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
