"""The judge: intervals, independence of batches, and what the rows claim."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dircluster.config import EvaluationConfig, RunConfig
from dircluster.data.sources import load
from dircluster.evaluation.benchmark import Result, evaluate, to_plain
from dircluster.evaluation.pictures import restoration_grid, to_pixels
from dircluster.evaluation.report import markdown_table
from dircluster.evaluation.statistics import wilson_interval
from dircluster.training import stages
from dircluster.training.parallel import Parallel

ALONE = Parallel(0, 1, torch.device("cpu"))


def test_wilson_interval() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="need 0 <= correct"):
        wilson_interval(1, 0)


def judged(smoke: RunConfig, **changes: int) -> list[Result]:
    settings = EvaluationConfig(images=24, steps=3, eot=2, draws=3, **changes)
    config = dataclasses.replace(smoke, evaluation=settings)
    denoiser, classifier = stages.build_denoiser(config).eval(), stages.build_classifier(config).eval()
    return evaluate(denoiser, classifier, load(config.data, 0).test, config, ALONE)


def test_the_rows_and_their_evidence(smoke: RunConfig) -> None:
    rows = {(r.defense, r.attack, r.masks): r for r in judged(smoke)}
    assert set(rows) == {
        ("none", "natural", "none"),
        ("none", "pgd3", "none"),
        ("dir", "natural", "fixed"),
        ("dir", "natural", "fresh"),
        ("dir", "pgd3", "fixed"),
        ("dir", "pgd3", "fresh"),
        ("dir", "transfer-pgd3", "fresh"),
    }
    eot = rows["dir", "pgd3", "fresh"]
    assert (eot.total, eot.steps, eot.eot, eot.draws, eot.epsilon) == (24, 3, 2, 3, 0.15)
    assert eot.always <= eot.mean
    assert rows["none", "pgd3", "none"].correct <= rows["none", "natural", "none"].correct
    low, high = eot.interval
    assert low <= eot.correct / eot.total <= high


def test_batches_do_not_matter(smoke: RunConfig) -> None:
    assert judged(smoke, batch_size=24) == judged(smoke, batch_size=5)


def test_results_survive_json(smoke: RunConfig) -> None:
    rows = to_plain(judged(smoke))
    assert json.loads(json.dumps(rows)) == rows
    assert markdown_table(rows).count("\n") == 8


def test_pictures(smoke: RunConfig) -> None:
    recipe = stages.dir_stage(smoke, stages.build_denoiser(smoke), stages.build_classifier(smoke)).recipe
    grid = restoration_grid(recipe, load(smoke.data, 0).held_out, smoke, torch.device("cpu"), images=4)
    assert grid.shape == (5, 4, 1, 8, 8)
    assert (grid[1] - grid[0]).abs().max() <= 0.15 + 1e-6
    masked = grid[2] == 0
    assert masked.float().mean() >= 0.5  # half of the patches, and black pixels
    pixels = to_pixels(grid)
    assert pixels.shape == (5 * 66, 4 * 66, 3)
    assert pixels.dtype.name == "uint8"
