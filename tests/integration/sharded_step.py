"""One DIR step on a sharded denoiser under torchrun; rank 0 prints what was exchanged, as JSON."""

from __future__ import annotations

import dataclasses
import json

import torch

from dircluster.presets import preset
from dircluster.recipes.base import Batch
from dircluster.rng import Stream
from dircluster.training import stages
from dircluster.training.parallel import OrderedReduceScatter, PairwiseSum, local_workers, whole


def main() -> None:
    config = preset("digits_smoke")
    model = dataclasses.replace(config.model, encoder_depth=3)
    config = dataclasses.replace(config, model=model)
    with local_workers(config.scaling) as parallel:
        models = stages.Models(config, parallel)
        total = sum(p.numel() for p in models.denoiser.parameters())
        recipe = stages.dir_stage(config, models.denoiser, models.classifier).recipe
        recipe.train()
        parallel.wrap(recipe, recipe.trained, "fsdp", False, PairwiseSum([]))
        here = sum(p.to_local().numel() for p in models.denoiser.parameters())
        draws = torch.Generator().manual_seed(parallel.rank)
        images = torch.rand(4, 1, 8, 8, generator=draws)
        rows = slice(4 * parallel.rank, 4 * parallel.rank + 4)
        batch = Batch(images, torch.arange(4), Stream(0, 0, 0, 8, rows, parallel.device))
        crafted = recipe.craft(batch)
        crafting = OrderedReduceScatter.calls
        gradients = []
        for again in (False, True):
            models.denoiser.recompute = again
            models.denoiser.zero_grad()
            recipe(crafted)["loss"].backward()
            gradients.append(whole({n: p.grad for n, p in models.denoiser.named_parameters()}))
        found = {
            "while crafting": crafting,
            "in the backward pass": (OrderedReduceScatter.calls - crafting) // 2,
            "layers": config.model.encoder_depth + config.model.decoder_depth + 1,
            "share of the weights on a worker": here / total,
            "recomputing changes the gradient by": max(
                float((a - gradients[1][n]).abs().max()) for n, a in gradients[0].items()
            ),
        }
        if parallel.first:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
