"""Several updates a step, in order, as a GAN has them; and a running mean of weights that is kept and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dircluster.config import ConfigError, OptimizerConfig, RunConfig, with_values
from dircluster.data.loader import Loader
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.defenses.recipe import Batch, Recipe
from dircluster.defenses.stage import Stage
from dircluster.distributed.parallel import Parallel
from dircluster.presets.dir import DirRun
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.interrupt import Interrupted
from dircluster.training.protocols import NoRecord, Quiet
from dircluster.training.running_mean import RunningMean
from dircluster.training.trainer import Trainer
from tests.conftest import ALONE
from tests.unit.training.conftest import StopAfter, make_trainer


class Game(Recipe):
    """A critic that is taught first, and a maker that is then judged by the critic as it has become."""

    trained = ("critic", "maker")
    updates = (("critic",), ("maker",))

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.critic, self.maker = nn.Linear(64, 1), nn.Linear(64, 64)
        self.seen: list[tuple[int, float]] = []
        self.attacks = 0

    def attack(self, batch: Batch) -> Batch:
        self.attacks += 1
        return dataclasses.replace(batch, adversarial=batch.images.flip(3))

    def forward(self, batch: Batch, update: int = 0) -> dict[str, Tensor]:
        self.seen.append((update, float(self.critic.weight.detach().sum())))
        made = self.maker(batch.attacked.flatten(1))
        if update == 0:
            loss = (self.critic(made.detach()) - 1).square().mean() + self.critic(
                batch.images.flatten(1)
            ).square().mean()
            return {"loss": loss, "critic": loss}
        loss = self.critic(made).square().mean()
        return {"loss": loss, "maker": loss}


def trainer(run: RunConfig, recipe: Recipe, folder: Path, console: Quiet, parallel: Parallel = ALONE) -> Trainer:
    knobs = OptimizerConfig(name="adamw", lr=1e-2, schedule="constant")
    stage = Stage("game", lambda modules: recipe, 2, {"critic": knobs, "maker": knobs}, keep="last", ema=0.9)
    data = load(run.data, run.seed)
    assert isinstance(data.train, Split)
    loader = Loader(data.train, run.training.batch_size, run.seed, "game")
    return Trainer(stage, recipe, loader, data.held_out, run, parallel, Checkpoints(folder, "k"), NoRecord(), console)


def test_each_update_steps_its_own_optimizers_in_order(smoke: DirRun, tmp_path: Path) -> None:
    recipe = Game()
    made = trainer(smoke, recipe, tmp_path, Quiet())
    maker = recipe.maker.weight.detach().clone()
    terms, _ = made.step(0)
    parts = 4  # micro-batches
    assert recipe.attacks == parts  # attacked once, for both updates
    assert [update for update, _ in recipe.seen] == [0] * parts + [1] * parts
    before, after = {value for _, value in recipe.seen[:parts]}, {value for _, value in recipe.seen[parts:]}
    assert len(before) == len(after) == 1
    assert before != after  # the maker meets the critic that has just been taught
    assert not torch.equal(recipe.maker.weight, maker)
    assert terms["loss"] == pytest.approx(terms["critic"] + terms["maker"])


def test_updates_and_means_resume_to_the_bit_without_validation(smoke: DirRun, tmp_path: Path) -> None:
    whole = Game()
    assert trainer(smoke, whole, tmp_path / "whole", Quiet()).run() is None  # nothing is deployed, nothing validated
    resumes = 0
    while True:
        broken = Game()
        try:
            trainer(smoke, broken, tmp_path / "broken", StopAfter(2)).run()
            break
        except Interrupted:
            resumes += 1
    assert resumes >= 2
    for name, value in whole.state_dict().items():
        assert torch.equal(value, broken.state_dict()[name]), name


def test_the_mean_is_what_a_stage_keeps(smoke: DirRun, tmp_path: Path) -> None:
    made = trainer(smoke, Game(), tmp_path, Quiet())
    made.run()
    held = made.mean.tensors["maker.weight"]
    assert torch.equal(made.recipe.state_dict()["maker.weight"], held)
    last = made.checkpoints.latest()
    assert last is not None
    assert torch.equal(last.tensors["ema"]["maker.weight"], held)
    assert not torch.equal(last.tensors["model"]["maker.weight"], held)


def test_the_mean_is_what_is_validated_and_kept_as_best(smoke: DirRun, tmp_path: Path) -> None:
    made = make_trainer(with_values(smoke, {"dir.ema": 0.9, "dir.keep": "best"}), tmp_path)
    for step in range(made.loader.steps_per_epoch):
        made.step(step)
    made._judge(made.loader.steps_per_epoch)
    assert made.new_best is not None
    _, best, _ = made.new_best
    own = made.recipe.state_dict()
    for name, value in made.mean.tensors.items():
        assert torch.equal(best[name], value)
        assert not torch.equal(own[name], value)


def test_several_workers_refuse_several_updates(smoke: DirRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="game has several updates a step"):
        trainer(smoke, Game(), tmp_path, Quiet(), Parallel(0, 2, torch.device("cpu")))


def test_the_running_mean_is_its_definition() -> None:
    """Of the new weights it takes nine tenths at first, and a tenth at a decay of 0.9 in the end."""
    mean, value = RunningMean(0.9, {"w": torch.tensor([4.0]), "count": torch.tensor(0)}), 4.0
    for step in range(200):
        mean.follow({"w": torch.tensor([float(step % 7)]), "count": torch.tensor(step)}, step)
        decay = min(0.9, (1 + step) / (10 + step))
        value = decay * value + (1 - decay) * (step % 7)
        assert mean.tensors["w"].item() == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert mean.tensors["count"].item() == 199
