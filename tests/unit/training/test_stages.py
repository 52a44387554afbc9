"""What a stage trains on: batches of its own order, augmented as the run and the stage say."""

from __future__ import annotations

from dataclasses import replace

import torch

from dircluster.config import with_values
from dircluster.data.loader import Loader
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.presets import preset
from dircluster.presets.dir import DirRun
from dircluster.training.stages import find_stage, loader_of, stages_of
from tests.conftest import ALONE


def test_images_are_cropped_and_flipped_unless_a_stage_says_otherwise(smoke: DirRun) -> None:
    run = with_values(smoke, {"data.crop_padding": 1, "data.flip": True})
    train, stage = load(run.data, run.seed).train, find_stage(run, "dir")
    assert isinstance(train, Split)
    for augments in (True, False):
        images, labels, _ = loader_of(replace(stage, augments=augments), train, run, ALONE)(2, 1)
        how = {"crop_padding": 1, "flip": True} if augments else {}
        expected = Loader(train, run.training.batch_size, run.seed, "dir", **how)(2, 1)  # type: ignore[arg-type]
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


def test_a_stage_that_ends_before_its_milestones_is_noted() -> None:
    def notes(changes: dict[str, object]) -> list[tuple[str, ...]]:
        return [stage.notes for stage in stages_of(with_values(preset("cifar10"), changes))]

    said = ("the learning rate never falls: milestones 75, 90 of 75 epochs",)
    assert notes({}) == notes({"target.epochs": 76}) == [(), (), ()]
    assert notes({"target.epochs": 75}) == [said, (), ()]
    assert notes({"target.epochs": 75, "target.optimizer.milestones": (90, 60)}) == [(), (), ()]
    assert notes({"target.epochs": 75, "target.optimizer.schedule": "cosine"}) == [(), (), ()]
    assert notes({"dir.joint": True, "pretrain.epochs": 0, "dir.epochs": 75}) == [said]  # of both, which are the same
