"""The loop: resume is exact from any step, a broken loss changes nothing, the best weights win."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster.cluster.outcome import outcome_of
from dircluster.config import ConfigError, RunConfig, TrainingConfig, with_values
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.defenses.stage import Stage
from dircluster.defenses.table import find_defense
from dircluster.distributed.parallel import Parallel
from dircluster.presets import preset
from dircluster.training import checkpoint
from dircluster.training.checkpoint import Checkpoints
from dircluster.training.interrupt import Interrupted
from dircluster.training.memory import resting
from dircluster.training.protocols import NoRecord, NoTracker, Quiet, Status
from dircluster.training.run import Run
from dircluster.training.stages import find_stage
from dircluster.training.step import NonFiniteLoss, check_shared
from dircluster.training.trainer import Trainer
from dircluster.training.validation import _batch_size
from tests.conftest import ALONE
from tests.unit.training.conftest import BATCH_NORMED, Hears, StopAfter, elsewhere, make_trainer, run, weights


class Flat(nn.Module):
    """A target that does not say what its features are."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("joint", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_run_interrupted_at_any_step_ends_in_the_same_bits(
    smoke: RunConfig, tmp_path: Path, joint: bool, every: int
) -> None:
    if joint:
        smoke = dataclasses.replace(
            smoke,
            dir=dataclasses.replace(smoke.dir, joint=True, target_optimizer=smoke.target.optimizer),
            pretrain=dataclasses.replace(smoke.pretrain, epochs=0),
            target=dataclasses.replace(smoke.target, architecture=BATCH_NORMED),
            data=dataclasses.replace(smoke.data, limit=36),
        )
    whole = run(elsewhere(smoke, tmp_path / "whole"))
    broken = elsewhere(smoke, tmp_path / "broken")
    interruptions = 0
    while True:
        try:
            outcome = run(broken, StopAfter(every))
            break
        except Interrupted:
            interruptions += 1
    assert interruptions >= (4 if joint else 20) // every
    assert weights(outcome) == weights(whole)
    assert outcome["results"] == whole["results"]
    assert outcome["selection"] == whole["selection"]


def test_a_stage_knows_the_code_that_trained_it(smoke: RunConfig, tmp_path: Path) -> None:
    def by(version: str, console: Any = None) -> dict[str, Any]:
        config = elsewhere(smoke, tmp_path / "broken")
        return Run(config, ALONE, NoTracker(), console or Quiet(), version=version).execute()

    with pytest.raises(Interrupted):
        by("one", StopAfter(3))
    broken = by("two")
    assert broken["trained_by"] == {"target": ["one", "two"], "pretrain": ["two"], "dir": ["two"]}
    assert broken["resumed"] == ["target"]
    again = by("three")
    assert (again["trained_by"], again["resumed"]) == (broken["trained_by"], [])
    unrecorded = run(elsewhere(smoke, tmp_path / "unrecorded"))
    assert unrecorded["trained_by"] == {"target": [], "pretrain": [], "dir": []}
    stages = [sorted(file.parent.name for file in (tmp_path / f).glob("*/final")) for f in ("broken", "unrecorded")]
    assert stages[0] == stages[1]  # whoever trained it, it is the same stage


@pytest.mark.long
def test_a_finished_stage_is_reused_and_a_changed_one_is_not(smoke: RunConfig) -> None:
    console = Hears()

    def reused() -> list[str]:
        return [line.split(":")[0] for line in console.lines if "reused" in line]

    first = run(smoke, console)
    assert reused() == []
    again = run(smoke, console)
    assert reused() == ["target", "pretrain", "dir", "evaluation"]
    assert again["results"] == first["results"]
    console.lines.clear()
    other = run(dataclasses.replace(smoke, dir=dataclasses.replace(smoke.dir, alpha=1.0)), console)
    assert reused() == ["target", "pretrain"]
    assert other["checkpoint"] != first["checkpoint"]
    assert weights(other) != weights(first)


@pytest.mark.long
def test_fresh_starts_beside_what_is_there(smoke: RunConfig) -> None:
    first = run(smoke)
    anew = run(smoke, fresh="t1")
    assert anew["checkpoint"] == first["checkpoint"].replace("/final", ".2/final")
    assert weights(anew) == weights(first)
    assert run(smoke, fresh="t1")["checkpoint"] == anew["checkpoint"]
    assert run(smoke)["checkpoint"] == anew["checkpoint"]


def test_a_damaged_result_is_made_again(smoke: RunConfig) -> None:
    first = run(smoke)
    whole = weights(first)
    file = Path(first["checkpoint"]) / "denoiser.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert weights(run(smoke)) == whole


@pytest.mark.long
def test_two_jobs_do_not_train_one_stage(smoke: RunConfig) -> None:
    refused: dict[str, str] = {}

    class StartsAnother(Quiet):
        def show(self, status: Status) -> None:
            if status.stage not in refused:
                ended = outcome_of(lambda: run(smoke))
                assert ended["busy"]  # which a sweep waits for
                refused[status.stage] = ended["error"]

    run(smoke, StartsAnother())
    assert list(refused) == ["target", "pretrain", "dir"]
    assert all("another job is training" in error for error in refused.values())


def test_a_run_that_ends_while_storage_is_down_ends_as_what_it_is(
    smoke: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    class StopAndHear(StopAfter):
        def say(self, line: str) -> None:
            lines.append(line)

    lines: list[str] = []
    monkeypatch.setattr(Checkpoints, "save", full)
    monkeypatch.setattr("dircluster.training.trainer.INTERRUPTED_PATIENCE", 1.0)
    outcome = outcome_of(lambda: run(smoke, StopAndHear(1)))
    assert (outcome["status"], outcome["signal"]) == ("KILLED", 15)
    assert [line for line in lines if "took no checkpoint for 1 s" in line]

    impatient = dataclasses.replace(smoke.storage, patience=1.0, checkpoint_every=3)
    trainer = make_trainer(dataclasses.replace(smoke, storage=impatient), tmp_path)
    trainer.console = StopAndHear(99)
    monkeypatch.setattr(trainer, "_must_be_finite", lambda terms, step: step < 3 or _broken())
    with pytest.raises(NonFiniteLoss, match="broken"):
        trainer.run()


def _broken() -> None:
    raise NonFiniteLoss("broken")


def test_a_signal_while_crafting_or_judging_changes_nothing(smoke: RunConfig, tmp_path: Path) -> None:
    """Each pass of the target is a place where a single worker may be stopped."""

    class StopAtPass(Quiet):
        def __init__(self, passes: int) -> None:
            self.left = passes

        def stop_signal(self) -> int:
            self.left -= 1
            return 2 if self.left < 0 else 0

    smoke = dataclasses.replace(
        smoke,
        dir=dataclasses.replace(smoke.dir, joint=True, epochs=2, target_optimizer=smoke.target.optimizer),
        pretrain=dataclasses.replace(smoke.pretrain, epochs=0),
        target=dataclasses.replace(smoke.target, architecture=BATCH_NORMED),
        data=dataclasses.replace(smoke.data, limit=36),
    )
    whole = run(elsewhere(smoke, tmp_path / "whole"))
    broken = elsewhere(smoke, tmp_path / "broken")
    for passes in (2, 9, 11, 14, 5, 13, 16):
        with contextlib.suppress(Interrupted):
            run(broken, StopAtPass(passes))
    outcome = run(broken)
    assert weights(outcome) == weights(whole)
    assert outcome["selection"] == whole["selection"]


@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over_on_resume(smoke: RunConfig, tmp_path: Path) -> None:
    whole = run(elsewhere(smoke, tmp_path / "whole"))
    broken = elsewhere(smoke, tmp_path / "broken")
    with pytest.raises(Interrupted):
        run(broken, StopAfter(5))
    newest = sorted((tmp_path / "broken").glob("target-*/step-*"))[-1]
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    console = Hears()
    outcome = run(broken, console)
    assert [line for line in console.lines if "damaged" in line and "falling back" in line]
    assert weights(outcome) == weights(whole)


def test_a_picture_is_drawn_although_a_signal_ended_the_selection_before_it(smoke: RunConfig, tmp_path: Path) -> None:
    class StopsAtTheEnd(Quiet):
        ended = False

        def show(self, status: Status) -> None:
            self.ended = status.step == status.steps

        def stop_signal(self) -> int:
            return 2 if self.ended else 0

    class Drawn(NoRecord):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def picture(self, name: str, pixels: Any, step: int) -> None:
            self.steps.append(step)

    first, second = make_trainer(smoke, tmp_path), make_trainer(smoke, tmp_path)
    first.console, first.record, second.record = StopsAtTheEnd(), Drawn(), (drawn := Drawn())
    with pytest.raises(Interrupted):
        first.run()
    second.run()
    assert second.begun_at == second.steps
    assert drawn.steps == [second.steps]


def test_workers_resume_by_what_the_first_one_found(smoke: RunConfig, tmp_path: Path) -> None:
    """Where the best weights are damaged it has none, and all of them have to judge again."""
    smoke = with_values(smoke, {"dir.keep": "best"})
    make_trainer(smoke, tmp_path).run()
    (best,) = tmp_path.glob("best-*")
    file = best / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    again, other = make_trainer(smoke, tmp_path), make_trainer(smoke, tmp_path)
    step = again._resume()
    told = max(tmp_path.glob("step-*")).name, again.best
    other.parallel = SimpleNamespace(first=False, first_does=lambda work: told)  # type: ignore[assignment]
    assert (other._resume(), other.best) == (step, again.best)
    assert again.best is None


def test_a_signal_that_is_known_before_the_selection_does_not_wait_for_it(
    smoke: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(smoke, tmp_path)
    judged: list[int] = []
    monkeypatch.setattr(trainer, "_judge", judged.append)
    trainer.step(0)
    with pytest.raises(Interrupted):
        trainer._judge_or_save(1, 15)
    assert (judged, trainer.saved) == ([], 1)


@pytest.mark.parametrize(
    ("settings", "world", "images"),
    [
        ({}, 1, 256),
        ({}, 8, 32),
        ({"training.microbatch": 16}, 2, 32),
        ({"parallel.activation_checkpointing": True}, 1, 128),
    ],
)
def test_on_a_gpu_selection_takes_no_more_memory_than_a_step(settings: dict[str, Any], world: int, images: int) -> None:
    """A frozen pass keeps less than half of what a step keeps of an image, unless that computes it again."""
    config = with_values(preset("cifar10"), settings)
    assert _batch_size(config, Parallel(0, world, torch.device("cuda"))) == images
    assert _batch_size(config, Parallel(0, world, torch.device("cpu"))) == config.evaluation.batch_size


def test_what_workers_cannot_share_is_asked_of_all_stages_before_the_first_is_trained(
    smoke: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of those that lie finished."""
    asked: list[str] = []

    def check(stage: Stage, *given: Any) -> None:
        asked.append(stage.name)

    monkeypatch.setattr("dircluster.training.run.check_shared", check)
    run(smoke, until="target")
    assert asked == ["target", "pretrain", "dir"]
    asked.clear()
    run(smoke, until="pretrain")
    assert asked == ["pretrain", "dir"]


@pytest.mark.parametrize(
    ("alone", "ema", "message"),
    [("has several updates", None, "dir has several updates: use"), (None, 0.9, "parallel.strategy must be ddp where")],
)
def test_what_workers_cannot_share_is_refused(
    alone: str | None, ema: float | None, message: str, smoke: RunConfig
) -> None:
    config = dataclasses.replace(smoke, parallel=dataclasses.replace(smoke.parallel, strategy="fsdp"))
    stage = dataclasses.replace(find_stage(config, "dir"), ema=ema)
    check_shared(stage, alone, config, ALONE)
    with pytest.raises(ConfigError, match=message):
        check_shared(stage, alone, config, dataclasses.replace(ALONE, world=2))


def test_the_speed_of_steps_does_not_count_what_a_resumed_run_makes_up_for(
    smoke: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shown(Quiet):
        def __init__(self) -> None:
            self.speeds: list[float] = []

        def show(self, status: Status) -> None:
            self.speeds.append(status.images_per_second)

    console, now = Shown(), [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    def resume() -> int:
        now[0] += 1000.0
        return 0

    made = make_trainer(with_values(smoke, {"tracking.log_every": 1}), tmp_path, console=console)
    monkeypatch.setattr(made, "_resume", resume)
    monkeypatch.setattr("dircluster.training.trainer.time", SimpleNamespace(monotonic=clock))
    made.run()
    assert min(console.speeds) > smoke.training.batch_size / 100


def test_a_gpu_that_is_too_small_is_one_line(smoke: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24")

    monkeypatch.setattr(Trainer, "run", full)
    with pytest.raises(ConfigError, match=r"^CUDA out of memory\. Tried .*: use a smaller --training.microbatch$"):
        run(smoke)


def test_a_stage_leaves_nothing_on_a_gpu(smoke: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its images there, and the next one would find both."""
    for name in ("reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    made = make_trainer(smoke, tmp_path)
    made.step(0)
    left = weakref.ref(made.loader)
    del made
    resting(torch.device("cuda"))
    assert left() is None


@pytest.mark.parametrize("microbatch", [None, 5])
def test_batches_are_numbered_over_the_whole_stage_whoever_made_those_before(
    smoke: RunConfig, tmp_path: Path, microbatch: int | None
) -> None:
    """By their numbers every k-th is attacked otherwise: the same in a run that was resumed."""
    trainer = make_trainer(with_values(smoke, {"training.microbatch": microbatch}), tmp_path)
    steps = [2 * trainer.loader.steps_per_epoch + 1, *range(trainer.loader.steps_per_epoch + 2)]
    for step in steps:
        assert {batch.number for batch in trainer.batches(step)} == {step}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_loss_stops_before_the_update_and_names_the_term(
    smoke: RunConfig, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(smoke, tmp_path)
    before = {k: v.clone() for k, v in trainer.recipe.state_dict().items()}
    compare = trainer.recipe.compare

    def broken(*arguments: Any) -> dict[str, Tensor]:
        terms = compare(*arguments)
        return {**terms, "representation": terms["representation"] * value, "loss": terms["loss"] * value}

    monkeypatch.setattr(trainer.recipe, "compare", broken)
    with pytest.raises(NonFiniteLoss, match="dir: representation is not finite at step 1"):
        trainer.step(0)
    assert all(torch.equal(v, before[k]) for k, v in trainer.recipe.state_dict().items())


def test_accumulation_changes_nothing_but_memory(smoke: RunConfig, tmp_path: Path) -> None:
    """Over one step: signs of tiny gradients, which rounding decides, soon lead two trainings apart."""
    found = []
    for parts in (1, 4):
        training = TrainingConfig(batch_size=16, microbatch=16 // parts)
        trainer = make_trainer(dataclasses.replace(smoke, training=training), tmp_path)
        loss = trainer.step(0)[0]["loss"]
        found.append((loss, torch.cat([p.grad.flatten() for p in trainer.parameters.values()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_every_image_weighs_the_same_where_micro_batches_differ(smoke: RunConfig, tmp_path: Path) -> None:
    """Of 10 images in three: 3, 3 and 4."""
    found = []
    for microbatch in (None, 4):
        training = TrainingConfig(batch_size=10, microbatch=microbatch)
        trainer = make_trainer(dataclasses.replace(smoke, training=training), tmp_path, stage="target")
        loss = trainer.step(0)[0]["loss"]
        found.append((loss, torch.cat([p.grad.flatten() for p in trainer.parameters.values()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_the_key_of_a_stage_holds_what_the_stages_before_it_ended_in(
    smoke: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str | None]] = []

    def finished(run: Run, stage: Stage, inputs: dict[str, str | None], *_: Any) -> Any:
        seen.append(dict(inputs))
        return SimpleNamespace(digest=f"of {stage.name}")

    monkeypatch.setattr(Run, "_stage", finished)
    run(smoke, until="dir")
    data = {"data": load(smoke.data, smoke.seed).fingerprint}
    assert seen == [data, data | {"target": "of target"}, data | {"target": "of target", "pretrain": "of pretrain"}]


def test_clipping_bounds_the_gradient(smoke: RunConfig, tmp_path: Path) -> None:
    optimizer = dataclasses.replace(smoke.dir.optimizer, name="sgd", clip=1e-3, weight_decay=0.0, momentum=0.0, lr=1.0)
    config = dataclasses.replace(smoke, dir=dataclasses.replace(smoke.dir, optimizer=optimizer))
    trainer = make_trainer(config, tmp_path)
    before = [p.detach().clone() for p in trainer.parameters.values()]
    trainer.step(3)
    moved = torch.stack([(p - b).norm() for p, b in zip(trainer.parameters.values(), before, strict=True)]).norm()
    rate = optimizer.rate(4 / trainer.loader.steps_per_epoch, config.dir.epochs)
    assert moved.item() == pytest.approx(1e-3 * rate, rel=1e-2)


def test_the_no_pretraining_ablation_and_bf16_run(smoke: RunConfig) -> None:
    config = dataclasses.replace(
        smoke,
        pretrain=dataclasses.replace(smoke.pretrain, epochs=0),
        dir=dataclasses.replace(smoke.dir, mse_weight=1.0),
        training=dataclasses.replace(smoke.training, precision="bf16"),
    )
    outcome = run(config)
    assert set(outcome["selection"]) == {"target", "dir"}
    assert not list(Path(config.storage.uri).glob("pretrain-*"))


@pytest.mark.parametrize("name", ["hgd", "jatp", "nrp"])
def test_a_target_that_a_later_stage_cannot_work_with_is_refused_before_it_is_trained(
    name: str, smoke: RunConfig
) -> None:
    config = with_values(preset(f"digits_{name}_smoke"), {"target.architecture": f"{__name__}:Flat"})
    with pytest.raises(ConfigError, match=r"the target \(Flat\) does not say"):
        run(dataclasses.replace(config, storage=smoke.storage))
    assert not list(Path(smoke.storage.uri).glob("target-*"))


class Draws(nn.Module):
    """A target that adds noise of its own to what it sees."""

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer((images + torch.randn_like(images)).flatten(1))
        return logits


def test_a_target_that_draws_is_judged_as_one_that_does(smoke: RunConfig) -> None:
    """Behind a purifier that draws nothing: its draws are known, or fresh, and no row is of the target alone."""
    console = Hears()
    run_of = with_values(preset("digits_identity_smoke"), {"target.architecture": f"{__name__}:Draws"})
    rows = run(dataclasses.replace(run_of, storage=smoke.storage, data=smoke.data), console)["results"]
    assert {row["randomness"] for row in rows} == {"fixed", "fresh"}
    assert {row["defense"] for row in rows} == {"identity"}
    assert "evaluation: the classifier draws at random: it is judged behind the purifier alone" in console.lines


def test_a_target_that_draws_behind_a_purifier_that_does_is_refused(smoke: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"Draws' draws at random, and so does the purifier"):
        run(with_values(smoke, {"target.architecture": f"{__name__}:Draws"}))
    assert not list(Path(smoke.storage.uri).glob("target-*"))


@pytest.mark.long
@pytest.mark.parametrize("objective", ["natural", "trades", "mart"])
def test_targets_of_every_objective_train(smoke: RunConfig, objective: Any) -> None:
    """Stages after the target's are the same whatever it learned by, and are not trained here."""
    outcome = run(with_values(smoke, {"target.objective": objective}), until="target")
    assert set(outcome["selection"]) == {"target"}
    (final,) = Path(smoke.storage.uri).glob("*/final")
    (trained,) = checkpoint.read(final).tensors.values()
    begun = find_defense("dir").build(smoke, "classifier")
    assert not any(torch.equal(weight, trained[name]) for name, weight in begun.named_parameters())


def test_the_best_weights_are_the_first_of_the_highest_robust_accuracy(
    smoke: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = iter([(0.9, 0.3), (0.8, 0.5), (0.9, 0.5), (0.9, 0.4)])
    monkeypatch.setattr("dircluster.training.trainer.held_out_accuracy", lambda *_: next(planted))
    made = make_trainer(with_values(smoke, {"dir.keep": "best"}), tmp_path)
    for step in range(1, 5):
        made._judge(step)
    best = {"step": 2, "natural": 0.8, "robust": 0.5, "folder": "best-00000002"}
    assert made.best == {**best, "last": {"step": 4, "natural": 0.9, "robust": 0.4}}


def test_a_run_selects_on_held_out_images(smoke: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Split] = []

    def judged(deployed: nn.Module, split: Split, *_: Any) -> tuple[float, float]:
        seen.append(split)
        return 0.5, 0.5

    monkeypatch.setattr("dircluster.training.trainer.held_out_accuracy", judged)
    run(smoke, until="target")
    held_out = load(smoke.data, smoke.seed).held_out
    assert seen
    assert all(torch.equal(split.images, held_out.images) for split in seen)


@pytest.mark.long
@pytest.mark.parametrize("keep", ["best", "last"])
def test_dir_ends_on_its_best_weights_or_on_its_last(smoke: RunConfig, keep: str) -> None:
    config = with_values(smoke, {"dir.keep": keep})
    done = run(config)
    final = Path(done["checkpoint"])
    kept = checkpoint.read(final).tensors["denoiser"]
    last = max(final.parent.glob("step-*"))
    model = checkpoint.read(last).tensors["model"]
    named = done["selection"]["dir"]["folder"]
    assert (named is None) is (keep == "last")
    accuracies = done["selection"]["dir"]  # of what is kept
    newest = accuracies.pop("last")
    assert (accuracies == {**newest, "folder": None}) is (keep == "last")
    expected = model if named is None else checkpoint.read(final.parent / named).tensors["model"]
    assert all(torch.equal(value, expected[f"denoiser.{name}"]) for name, value in kept.items())
