"""Batches are a function of (seed, epoch, step)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dircluster.config import ConfigError
from dircluster.data.augment import crop
from dircluster.data.loader import Loader
from dircluster.data.split import Split

SPLIT = Split(
    torch.arange(40 * 9, dtype=torch.int64).remainder(256).to(torch.uint8).view(40, 1, 3, 3), torch.arange(40)
)


def make(**changes: Any) -> Loader:
    return Loader(SPLIT, 8, 0, "test", **changes)


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own() -> None:
    loader = make()
    epochs = [torch.cat([loader(epoch, step)[1] for step in range(5)]) for epoch in (0, 1)]
    assert [sorted(e.tolist()) for e in epochs] == [list(range(40))] * 2
    assert not torch.equal(*epochs)
    assert torch.equal(make()(1, 3)[1], epochs[1][24:32])


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_batch_of_one(world: int) -> None:
    whole = make(crop_padding=1, flip=True)(2, 3)
    shares = [make(crop_padding=1, flip=True, rank=r, world=world)(2, 3) for r in range(world)]
    assert torch.equal(torch.cat([s[0] for s in shares]), whole[0])
    assert torch.equal(torch.cat([s[1] for s in shares]), whole[1])


def test_crop_is_a_shift_with_zeros() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3)
    assert torch.equal(crop(image, torch.tensor([[1, 1]]), 1), image)
    assert crop(image, torch.tensor([[0, 2]]), 1)[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]


def test_crops_are_of_every_place_about_as_often() -> None:
    loader, seen = make(crop_padding=1), dict[tuple[int, int], int]()
    places = [(row, column) for row in range(3) for column in range(3)]
    for epoch in range(20):
        for step in range(5):
            images, labels, _ = loader(epoch, step)
            shifted = [crop(SPLIT.pixels(labels), torch.tensor([place] * 8), 1) for place in places]
            for place, found in zip(places, shifted, strict=True):
                seen[place] = seen.get(place, 0) + int((images == found).flatten(1).all(1).sum())
    assert sum(seen.values()) == 800
    assert all(49 < count < 129 for count in seen.values())  # 89 each, deviation 9


def test_flips_mirror_about_half() -> None:
    loader = make(flip=True)
    mirrored = 0
    for epoch in range(20):
        for step in range(5):
            images, labels, _ = loader(epoch, step)
            plain = SPLIT.pixels(labels)
            same = (images == plain).flatten(1).all(1)
            assert ((images == plain.flip(3)).flatten(1).all(1) | same).all()
            mirrored += int((~same).sum())
    assert 330 < mirrored < 470  # 800 fair coins: 400, deviation 14


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size 64 is more than the 40 training images"):
        Loader(SPLIT, 64, 0, "test")
    with pytest.raises(ConfigError, match="at least the 9 workers"):
        Loader(SPLIT, 8, 0, "test", world=9)


def test_stages_draw_each_their_own() -> None:
    draws = [Loader(SPLIT, 8, 0, stage)(1, 2)[2].uniform("pgd", (3,)) for stage in ("target", "target", "dir")]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
