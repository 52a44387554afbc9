"""What is examined: a device, a run's networks on it, and real pixels to pass through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster import rng
from dircluster.config import DataConfig, RunConfig
from dircluster.data.split import Split
from dircluster.defenses.base import Defended, Purifier
from dircluster.distributed.parallel import Parallel
from dircluster.models.precision import is_half
from dircluster.training.profiling import stage_stepper
from dircluster.training.stages import Networks, find_stage
from dircluster.training.step import Stepper

CPU = torch.device("cpu")
_CUDNN: Any = torch.backends.cudnn
PLACES: tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn)
"""Where PyTorch keeps the precision of fp32 on a GPU: of products, convolutions, recurrent layers."""


@dataclasses.dataclass
class Machine:
    """A device and the run that is to be trained on it."""

    config: RunConfig
    parallel: Parallel
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Operations a second of matrix products by their precision, once they are measured."""

    @property
    def device(self) -> torch.device:
        """The device under examination."""
        return self.parallel.device

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    @property
    def half(self) -> bool:
        """Whether the run's steps compute in bf16 here, as ``training.precision`` says."""
        return is_half(self.config.training.precision, self.device)

    @property
    def alone(self) -> Parallel:
        """One process that computes on the CPU, for reference."""
        return Parallel(0, 1, CPU)

    def defended(self, parallel: Parallel | None = None) -> Defended:
        """h(g(x)) with the run's initial weights, in eval mode."""
        networks = Networks(plain(self.config), parallel or self.parallel)
        return networks.defense.defended(self.config, networks).eval()

    def pictures(self, count: int) -> Split:
        """So many images of the run's shape."""
        return pictures(self.config.data, count)


def plain(config: RunConfig, **training: Any) -> RunConfig:
    """``config`` in fp32, neither compiled nor captured, but for what ``training`` says."""
    made = {"precision": "fp32", "compile": "off", "capture": "off", **training}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **made))


def pictures(data: DataConfig, count: int) -> Split:
    """Real pixels without a download: pieces of scikit-learn's two photographs, their brightness for a class."""
    from sklearn.datasets import load_sample_images

    found = [torch.tensor(photo).permute(2, 0, 1).float() for photo in load_sample_images().images]
    draws = torch.rand(count, 2, generator=rng.generator(0, "doctor/pictures"), dtype=torch.float64).tolist()
    side = (2 * data.height, 2 * data.width)
    pieces = []
    for number, (down, right) in enumerate(draws):
        photo = found[number % len(found)]
        height, width = (min(wanted, there) for wanted, there in zip(side, photo.shape[1:], strict=True))
        top, left = int(down * (photo.shape[1] - height + 1)), int(right * (photo.shape[2] - width + 1))
        piece = photo[None, :, top : top + height, left : left + width]
        pieces.append(F.interpolate(piece, (data.height, data.width), mode="area")[0])
    images = torch.stack(pieces)
    images = images if data.channels == 3 else images.mean(dim=1, keepdim=True).expand(-1, data.channels, -1, -1)
    order = images.mean(dim=(1, 2, 3)).argsort().argsort()
    return Split(images.round().to(torch.uint8), order * data.classes // count)


@contextmanager
def stepper(config: RunConfig, stage: str, split: Split, parallel: Parallel, **changes: Any) -> Iterator[Stepper]:
    """The steps of a stage, with ``changes`` to it, over ``split`` from initial weights."""
    wanted = dataclasses.replace(find_stage(config, stage), **changes)
    made = stage_stepper(wanted, wanted.recipe(Networks(config, parallel)), config, split, parallel)
    try:
        yield made
    finally:
        made.batches.close()
        made.captured = None  # a graph holds memory
        if config.training.compiles:
            torch.compiler.reset()  # graphs of other batch sizes would count against the limit


@contextmanager
def true_fp32(precision: str = "ieee") -> Iterator[None]:
    """Products and convolutions of fp32 in fp32 inside, or in another ``precision``: tf32."""
    before = [place.fp32_precision for place in PLACES]
    try:
        for place in PLACES:
            place.fp32_precision = precision
        yield
    finally:
        for place, found in zip(PLACES, before, strict=True):
            place.fp32_precision = found


def drawn(purifier: Purifier, images: int, device: torch.device) -> Tensor | None:
    """One draw of a purifier for so many images, always the same; None where it draws nothing."""
    found = purifier.draw(rng.generator(0, "doctor/draw"), images)
    return None if found is None else found.to(device)


def relative(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||, in float64 on the CPU."""
    one, other = found.detach().double().cpu(), reference.detach().double().cpu()
    return float((one - other).norm() / other.norm())
