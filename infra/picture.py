"""The picture of the README: the first ten test images of CIFAR-10 through a defense, a column each.

    python infra/picture.py zoo:cifar10-dir FOLDER docs/restored_cifar10.png

FOLDER holds CIFAR-10 as parquet. Rows: natural; under white-box PGD-20 with draws known; what the first view leaves of
it; restored; restored minus natural around gray. It prints how much of what is restored lies outside [0, 1].
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from PIL import Image

import dircluster
from dircluster.data.sources import load
from dircluster.evaluation.pictures import to_pixels
from dircluster.presets import preset
from dircluster.training.validation import restoration_grid

SHOWN, COUNTED, PIXELS = 10, 200, 96


def main(defense: str, folder: str, picture: str) -> None:
    """See the module's docstring."""
    run = preset("cifar10")
    run = replace(run, data=replace(run.data, uri=folder), attack=replace(run.attack, steps=20))
    test, loaded = load(run.data, run.seed).test, dircluster.load_defense(defense)
    grid = restoration_grid(loaded, test, run, torch.device("cpu"), SHOWN)
    Image.fromarray(to_pixels(grid, PIXELS)).save(picture, optimize=True)
    with torch.no_grad():
        restored = loaded.fixed(run.seed).restore(test.pixels(slice(COUNTED)))
    outside = (restored < 0) | (restored > 1)
    excess = torch.maximum(-restored, restored - 1).clamp_min(0)
    print(f"restored pixels outside [0, 1]: {100 * outside.double().mean():.1f} %, farthest {excess.max():.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
