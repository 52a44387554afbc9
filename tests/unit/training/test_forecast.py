"""What is foretold of a run: its operations are those that run, its bytes those that lie in storage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from dircluster.attacks.apgd import SURVIVORS, malt_gradients
from dircluster.config import ConfigError, ParallelConfig, RunConfig, ScalingConfig, with_values
from dircluster.data.layout import split_sizes
from dircluster.data.sources import load
from dircluster.defenses.stage import Stage
from dircluster.defenses.table import find_defense
from dircluster.distributed.launch import WorkerError, on_local_workers
from dircluster.distributed.parallel import Parallel
from dircluster.evaluation.attack_table import ATTACKS, AttackSpec
from dircluster.evaluation.evaluation import Evaluation, run
from dircluster.evaluation.session import plan
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.victim import VictimModel
from dircluster.presets import preset
from dircluster.presets.dir import DirRun
from dircluster.training import costs, stages
from dircluster.training import forecast as module
from dircluster.training.checkpoint import DamagedError
from dircluster.training.costs import (
    count,
    counting,
    evaluation_operations,
    exchanged,
    forward_operations,
    gradient_operations,
    meta_networks,
    recipe_on_meta,
    step_operations,
)
from dircluster.training.forecast import (
    EVALUATION,
    Calibration,
    Pace,
    calibrate,
    forecast,
    from_plain,
    from_summary,
    to_plain,
)
from dircluster.training.profiling import device_name
from dircluster.training.protocols import NoTracker, Quiet
from dircluster.training.run import Run
from dircluster.training.validation import held_out_accuracy, overfitting
from tests.conftest import ALONE


@pytest.mark.parametrize(("workers", "gpus", "device"), [(4, 1, "cpu"), (4, 4, "auto"), (1, 1, "auto"), (4, 0, "cpu")])
def test_what_ray_gives_cpus_to_is_timed_on_a_cpu(
    workers: int, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = with_values(preset("digits"), {"scaling.workers": workers})
    assert module.as_launched(run, "ray").scaling.device == device
    assert module.as_launched(run, "local").scaling.device == "auto"


@pytest.mark.parametrize("name", ["quick", *(pytest.param(n, marks=pytest.mark.slow) for n in ("paper", "rigorous"))])
def test_an_evaluation_counts_what_it_runs(smoke: DirRun, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(smoke.evaluation, suite=name, steps=3, resubmissions=2, votes=3)  # type: ignore[arg-type]
    config = dataclasses.replace(smoke, evaluation=settings)
    networks, images = stages.Networks(config, ALONE), torch.rand(2, 1, 8, 8)
    victim = VictimModel(networks.defense.defended(config, networks), "dir")
    specs = [spec for spec in plan(victim, config.attack, settings).specs if ATTACKS[spec.attack].counts == "steps"]
    monkeypatch.setattr(costs, "plan", lambda *_: SimpleNamespace(specs=specs))  # without what is not counted
    counted = evaluation_operations.__wrapped__(config)
    judgment = Evaluation(specs, 2, 0, 2, settings.usual_rows, MemoryStore(), victim)
    with counting() as found:
        run(judgment, lambda start, stop: (images, torch.tensor([3, 5])))
    assert 2 * counted == found.total


def test_of_every_attack_it_is_known_what_it_takes() -> None:
    assert {name for name, attack in ATTACKS.items() if attack.counts != "steps" and attack.gradients is None} == {
        *costs.SEARCHES
    }


@pytest.mark.parametrize("survivors", [SURVIVORS, 0.1])
def test_malt_is_foretold_by_its_gradients(smoke: DirRun, survivors: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttackSpec("malt", randomness="fixed", epsilon=0.1, steps=2)
    monkeypatch.setattr(costs, "plan", lambda *_: SimpleNamespace(specs=[spec]))
    told = evaluation_operations.__wrapped__(smoke, survivors)
    defense = find_defense("dir").defended(smoke, meta_networks(smoke)).fixed(0)
    image = torch.zeros(1, 1, 8, 8, device="meta")
    judged = 2 * forward_operations(defense, image)  # under known draws and under fresh ones
    assert told == pytest.approx(malt_gradients(2, 10, survivors) * gradient_operations(defense, image) + judged)


@pytest.mark.long
@pytest.mark.parametrize(
    "spec",
    [
        AttackSpec("autoattack", randomness="fixed", epsilon=0.1, steps=50),
        AttackSpec("autoattack", randomness="fresh", epsilon=0.1, eot=2),
        AttackSpec("square", randomness="fresh", epsilon=0.1, steps=50, eot=2),
    ],
    ids=["standard", "rand", "square"],
)
def test_searches_are_foretold_by_what_they_take_where_nothing_is_fooled(
    smoke: DirRun, spec: AttackSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "plan", lambda *_: SimpleNamespace(specs=[spec]))
    smoke = with_values(smoke, {"data.classes": 4})
    counted = evaluation_operations.__wrapped__(smoke, 1.0)
    networks, images = stages.Networks(smoke, ALONE), torch.rand(1, 1, 8, 8)
    classifier = networks["classifier"]
    *_, last = (part for part in classifier.modules() if isinstance(part, torch.nn.Linear))
    torch.nn.init.zeros_(last.weight)  # whatever the image is, the answer is the same
    last.bias.data[:] = torch.arange(4) / 4
    victim = VictimModel(networks.defense.defended(smoke, networks), "dir")
    judgment = Evaluation([spec], 1, 0, 1, smoke.evaluation.usual_rows, MemoryStore(), victim)
    with counting() as found:
        run(judgment, lambda start, stop: (images, torch.tensor([3])))
    assert counted == pytest.approx(found.total, rel=0.03)


def test_repeated_work_is_counted_on_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_values(preset("digits_ebm_smoke"), {"model.steps": 4})
    told = evaluation_operations.__wrapped__(run), count(run)
    monkeypatch.setattr(costs, "FEW", 4)
    assert (evaluation_operations.__wrapped__(run), count(run)) == told


def test_chance_survives_of_what_a_smoke_run_judges() -> None:
    for name, images, share in (("digits", 1294, SURVIVORS), ("digits_smoke", 72, 0.1), ("cifar10_smoke", 43, 0.1)):
        run = preset(name)
        assert module.surviving(run, images) == share
        given = dataclasses.replace(run, target=dataclasses.replace(run.target, uri="here.safetensors"))
        assert module.surviving(given, images) == SURVIVORS  # whoever has trained it
    assert module.surviving(preset("cifar10_joint"), 45_000) == SURVIVORS  # which has no stage of its target
    assert module.surviving(preset("cifar100_smoke"), 43) == 0.01


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *(("digits_smoke", stage) for stage in ("target", "pretrain", "dir")),
        ("digits_jatp_smoke", "jatp"),
        ("digits_menet_a_smoke", "menet"),
    ],
)
def test_a_selection_counts_what_it_runs(name: str, stage: str) -> None:
    config = preset(name)
    data = load(config.data, 0)
    recipe = stages.find_stage(config, stage).recipe(stages.Networks(config, ALONE))
    deployed = recipe.deployed()
    assert deployed is not None
    images = min(config.training.select_images, len(data.held_out))
    with counting() as found:
        if recipe.attacks_deployed:
            overfitting(recipe, deployed, data.held_out, config, ALONE, images)
        held_out_accuracy(deployed, data.held_out, config, ALONE)
    with counting() as crafting:
        recipe.attack(recipe.batch(*_one(config)))
    crafted = images * crafting.total if recipe.attacks_deployed else 0  # at the pace of a step
    beside = module._selection(config, recipe_on_meta(config, stage), images)
    assert beside + crafted == pytest.approx(found.total, rel=1e-6)


def test_a_selection_of_a_target_with_batch_statistics_is_counted(smoke: DirRun) -> None:
    config = dataclasses.replace(smoke, target=dataclasses.replace(smoke.target, architecture="resnet18"))
    image = torch.zeros(1, 1, 8, 8, device="meta")
    network = meta_networks(config)["classifier"].eval()
    forward, gradient = forward_operations(network, image), gradient_operations(network, image)
    steps = config.training.select_steps or config.attack.steps
    found = module._selection(config, recipe_on_meta(config, "target"), 3)
    assert found >= 3 * (steps * gradient + 2 * forward)


def _one(config: RunConfig) -> tuple[torch.Tensor, torch.Tensor, object]:
    from dircluster.rng import Stream

    return torch.rand(1, 1, 8, 8), torch.tensor([3]), Stream(0, 0, 0, 1, slice(0, 1), ALONE.device)


@pytest.mark.long
def test_stages_take_their_operations_at_the_pace_that_was_seen(smoke: DirRun) -> None:
    paces = {name: Pace(1e9, 16, 7) for name in ("target", "pretrain", "dir", EVALUATION)}
    sizes = split_sizes(smoke.data)
    made = {one.name: one for one in forecast(smoke, Calibration("card", paces), *sizes)}
    steps = smoke.dir.epochs * (sizes[0] // smoke.training.batch_size)
    assert made["dir"].seconds > steps * step_operations(smoke, "dir") / 1e9
    judged = {**paces, EVALUATION: dataclasses.replace(paces[EVALUATION], operations_per_second=1e99)}
    quick = {one.name: one for one in forecast(smoke, Calibration("card", judged), *sizes)}
    images = min(sizes[1], smoke.training.select_images) * -(-smoke.dir.epochs // smoke.training.select_every)
    crafted = steps + images / smoke.training.batch_size  # the gauge's too
    assert quick["dir"].seconds == pytest.approx(crafted * step_operations(smoke, "dir") / 1e9)
    assert quick["target"].seconds == made["target"].seconds  # which has no pipeline
    faster = {name: dataclasses.replace(pace, operations_per_second=2e9) for name, pace in paces.items()}
    halved = {one.name: one for one in forecast(smoke, Calibration("card", faster), *sizes)}
    assert all(halved[name].seconds == pytest.approx(one.seconds / 2) for name, one in made.items())
    assert made[EVALUATION].seconds == pytest.approx(evaluation_operations(smoke, 0.1) * 16 / 1e9)
    with pytest.raises(ConfigError, match="--calibration knows nothing of stage pretrain, but of target"):
        forecast(smoke, Calibration("card", {"target": paces["target"]}), *sizes)


def test_workers_share_all_but_pictures(smoke: DirRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluation_operations", lambda *_: 3e9)
    found = Calibration("card", {"dir": Pace(1e9, 16, 0), EVALUATION: Pace(2e9, 16, 0)})
    for workers in (1, 4):
        run = with_values(smoke, {"scaling.workers": workers, "evaluation.images": 10})
        work = module.Work(EVALUATION, steps=8e9, passes=16e9, pictures=2e9)
        assert module.seconds_of(work, run, "dir", found) == pytest.approx(8 / workers + 8 / workers + 1)
        assert module.judging_seconds(run, found, 90, 40) == pytest.approx(10 * 1.5 / workers)


def test_what_a_stage_takes_once_is_part_of_its_forecast_but_not_of_an_epoch(smoke: DirRun) -> None:
    names = ("target", "pretrain", "dir", EVALUATION)
    without, found = (Calibration("card", {name: Pace(1e9, 16, 7, once) for name in names}) for once in (0.0, 5.0))
    more, less = (forecast(smoke, one, 90, 10, 40) for one in (found, without))
    assert all(one.seconds == pytest.approx(before.seconds + 5) for one, before in zip(more, less, strict=True))
    target = stages.stages_of(smoke)[0]
    assert module.stage_seconds(smoke, target, found, 90, 10) == module.stage_seconds(smoke, target, without, 90, 10)
    plain = to_plain(found)
    assert from_plain(plain) == found
    for pace in plain["paces"].values():
        del pace["once"]
    assert from_plain(plain) == without  # a summary of before it was measured


@pytest.mark.long
@pytest.mark.parametrize("every", [2, 1000])
def test_bytes_are_those_that_stay(smoke: DirRun, every: int) -> None:
    run = with_values(smoke, {"storage.checkpoint_every": every, "tracking.enabled": False})
    Run(run, ALONE, NoTracker(), Quiet()).execute()
    train = split_sizes(run.data)[0]
    for stage in stages.stages_of(run):
        (folder,) = Path(run.storage.uri).glob(f"{stage.name}-*")
        real = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        found = module._stored(run, stage, train)
        assert found == pytest.approx(real, rel=0.15)  # headers, and no best in the first epochs
        saved = sum(file.stat().st_size for file in max(folder.glob("step-*")).glob("*.safetensors"))
        assert module._sizes(run, stage).checkpoint == pytest.approx(saved, rel=0.15)


def test_pictures_that_wait_for_mlflow_are_bytes_too(smoke: DirRun) -> None:
    records, none = (with_values(smoke, {"tracking.enabled": enabled}) for enabled in (True, False))
    target, *_, last = stages.stages_of(smoke)
    assert module._stored(records, target, 90) == module._stored(none, target, 90)  # which draws none
    more = module._stored(records, last, 90) - module._stored(none, last, 90)
    assert more == 3 * (5 * 66) * (8 * 66) * 3  # beside, and in two checkpoints: rows, columns of pixels, RGB


def test_images_lie_in_the_memory_of_a_process_but_for_those_that_are_streamed(smoke: DirRun) -> None:
    paces = {name: Pace(1e9, 16, 1000) for name in ("target", "pretrain", "dir", EVALUATION)}

    def memory(run: DirRun, device: str) -> dict[str, int]:
        return {one.name: one.memory for one in forecast(run, Calibration(device, paces), 90, 10, 40)}

    saves = {stage.name: module._sizes(smoke, stage).on_its_way for stage in stages.stages_of(smoke)}
    held = memory(smoke, device_name(torch.device("cpu")))
    assert held == {name: 1000 + 140 * 64 + saves.get(name, 0) for name in paces}
    assert set(memory(smoke, "a card").values()) == {1000}
    streamed = memory(
        with_values(smoke, {"data.uri": "images", "data.stream": True, "data.limit": None}), "CPU, 1 threads"
    )
    assert streamed[EVALUATION] == 1000 + 50 * 64  # held-out and test images


def test_a_save_on_its_way_lies_in_the_memory_of_a_process(smoke: DirRun) -> None:
    target = stages.stages_of(smoke)[0]
    one = meta_networks(smoke)["classifier"].state_dict().values()
    weights = sum(4 * tensor.numel() for tensor in one)
    moments = weights * (1 if target.optimizers["classifier"].name == "sgd" else 2)
    copied = weights + moments + (weights if target.ema is not None else 0) + (weights if target.keep == "best" else 0)
    assert module._sizes(smoke, target).on_its_way == copied + 2 * max(weights, moments)


def test_a_machine_is_calibrated_and_its_summary_read(smoke: DirRun, tmp_path: Path) -> None:
    found = calibrate(smoke, ALONE, budget=0.01)
    assert set(found.paces) == {"target", "pretrain", "dir", EVALUATION}
    assert all(pace.operations_per_second > 0 and pace.memory > 0 for pace in found.paces.values())
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"calibration": dataclasses.asdict(found)}))
    assert from_summary(file) == found


def test_a_step_exchanges_what_its_stage_trains() -> None:
    joint, plain = preset("cifar10_joint"), preset("cifar10")

    def sent(run: RunConfig, strategy: Literal["ddp", "fsdp"] = "ddp", half: bool = False) -> int:
        found = dataclasses.replace(run, parallel=ParallelConfig(strategy))
        return exchanged(found, stages.stages_of(found)[-1], 8, half)

    counted = count(plain)
    assert sent(plain) == 2 * 4 * counted.purifier_parameters * 7 // 8
    assert sent(joint) == 2 * 4 * (counted.purifier_parameters + counted.target_parameters) * 7 // 8
    assert sent(plain, half=True) == sent(plain)  # gradients are whole
    finetuned = preset("cifar10_finetune")
    assert sent(finetuned, "fsdp") > 2 * sent(finetuned)  # gathered for each step of PGD
    assert 0.5 < sent(plain, "fsdp", half=True) / sent(plain, "fsdp") < 0.6


def test_steps_are_timed_in_the_order_of_a_run(smoke: DirRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where batches are made ahead, a step that is asked for again would wait for its own."""
    numbers: list[list[int]] = []

    def still(stage: Stage, *given: Any) -> Any:
        numbers.append(asked := [])
        assert {knobs.lr for knobs in stage.optimizers.values()} == {module.STILL}
        return SimpleNamespace(step=asked.append, batches=SimpleNamespace(close=lambda: asked.append(-1)))

    monkeypatch.setattr(module, "stage_stepper", still)
    calibrate(smoke, ALONE, budget=1e-3)
    for asked in numbers:
        assert asked == [*range(len(asked) - 1), -1]
    assert max(map(len, numbers)) > 4


def _calibrated(parallel: Parallel, config: RunConfig) -> dict[str, Any]:
    return to_plain(calibrate(config, parallel, budget=0.01))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_machine_is_calibrated_on_all_workers_at_once(
    smoke: DirRun, strategy: Literal["ddp", "fsdp"], capfd: pytest.CaptureFixture[str]
) -> None:
    two = ScalingConfig(workers=2, threads=1, device="cpu")
    target = dataclasses.replace(smoke.target, ema=None)  # which fsdp has not
    config = dataclasses.replace(smoke, target=target, scaling=two, parallel=ParallelConfig(strategy))
    found = from_plain(on_local_workers(two, _calibrated, config))
    assert set(found.paces) == {"target", "pretrain", "dir", EVALUATION}
    assert all(pace.images <= 8 for name, pace in found.paces.items() if name != EVALUATION)  # each one's half of 16
    assert capfd.readouterr().err == ""  # no library warns


def _failing(parallel: Parallel, error: Exception) -> None:
    if not parallel.first:
        raise error
    parallel.wait()  # for whom nobody comes to: it is ended


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DamagedError("the file of the second one is damaged"), "the file of the second one is damaged"),
        (OSError("no room\nand a hint"), "a worker on this machine failed: OSError: no room"),
    ],
)
def test_a_worker_that_fails_is_told_in_one_line(
    error: Exception, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        on_local_workers(ScalingConfig(workers=2, threads=1, device="cpu"), _failing, error)
    assert str(raised.value) == message
    assert type(raised.value) is (DamagedError if isinstance(error, DamagedError) else WorkerError)
    assert capfd.readouterr().err == ""


def _large(parallel: Parallel) -> str:
    return "x" * 1_000_000


def test_what_a_worker_returns_may_be_large() -> None:
    assert len(on_local_workers(ScalingConfig(workers=2, threads=1, device="cpu"), _large)) == 1_000_000


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "holds none: give the --summary of a --dry-run"), ("no", "holds none"), (None, "cannot be read")],
)
def test_what_is_no_calibration(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_summary(tmp_path / "plan.json")


def test_a_given_target_is_not_foretold() -> None:
    run = preset("digits")
    given = dataclasses.replace(run, target=dataclasses.replace(run.target, uri="here.safetensors"))
    assert [stage.name for stage in stages.trained_stages(given)] == ["pretrain", "dir"]


def test_what_all_images_need_alike_is_not_multiplied() -> None:
    assert module._carried_over({2: 110, 8: 140}, before=100, full=128) == 140 + 5 * 120
    assert module._carried_over({2: 110}, before=100, full=128) == 110 + 5 * 126  # nothing tells them apart
    assert module._carried_over({2: 150, 8: 140}, before=100, full=128) == 140
    assert module._carried_over({2: 110, 8: 140}, before=100, full=8) == 140


def test_seconds_that_all_images_share_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def timed(step: object, images: int, parallel: Parallel) -> float:
        asked.append(images)
        return 0.9 + 0.01 * images

    monkeypatch.setattr(module, "_timed", timed)
    found = module._pace(lambda images: None, 1e6, 4096, ALONE, budget=2.0)
    assert found.images == max(asked) == 32  # of 128 it is thought that they take more than two seconds
    assert found.operations_per_second == pytest.approx(4096e6 / (0.9 + 40.96))
    assert found.operations_per_second > 3 * 2e6 / 0.92  # what two images alone would tell


def test_an_evaluation_is_timed_on_as_many_rows_as_pass_together(
    smoke: DirRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int | None]] = []

    def pace(
        step: object, per_image: float, full: int, parallel: Parallel, budget: float, most: int | None = None
    ) -> Pace:
        asked.append((full, most))
        return Pace(1.0, full, 0)

    monkeypatch.setattr(module, "_pace", pace)
    for changed, rows in (
        ({}, (128, 256)),
        ({"images": 6}, (6, 60)),
        ({"rows": 5}, (5, 5)),
        ({"batch_size": 512}, (256, 256)),
    ):
        settings = dataclasses.replace(smoke.evaluation, **({"images": None, "batch_size": 128} | changed))
        calibrate(dataclasses.replace(smoke, evaluation=settings), ALONE)
        assert asked[-1] == rows


def test_a_step_with_gradients_of_the_pipeline_is_timed_as_what_it_is(
    smoke: DirRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_timed", lambda step, images, parallel: 1.0)
    config = with_values(smoke, {"attack.crafting": "target_first", "attack.pipeline_every": 2})
    found = calibrate(config, ALONE, budget=2.0).paces["dir"].operations_per_second
    assert found == step_operations(with_values(config, {"attack.pipeline_every": 1}), "dir")
    assert found > step_operations(config, "dir")  # a mean with steps that take it from the target alone


@pytest.mark.parametrize(("most", "memory"), [(None, 1000 + 10 * 32), (64, 1000 + 10 * 64)])
def test_memory_grows_with_the_images_that_pass_together(
    most: int | None, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    monkeypatch.setattr(module, "_timed", lambda step, images, parallel: step(images) or 1e-9)
    monkeypatch.setattr(module, "resting", lambda device: 900)
    monkeypatch.setattr(module, "peak", lambda device: 1000 + 10 * passed[-1])
    assert module._pace(passed.append, 1e6, 32, ALONE, 0.001, most).memory == memory


def test_the_first_time_of_a_size_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def timed(step: object, images: int, parallel: Parallel) -> float:
        asked.append(images)
        return 20.0 if asked.count(images) == 1 else 1 + 0.25 * images

    monkeypatch.setattr(module, "_timed", timed)
    found = module._pace(lambda images: None, 1e6, 128, ALONE, budget=2.0)
    assert found.operations_per_second == pytest.approx(128e6 / 33)
    assert found.once == 20 - 1.5
    assert asked == [2, 2, 8, 8]


def test_sizes_grow_until_they_tell_what_an_image_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def timed(step: object, images: int, parallel: Parallel) -> float:
        asked.append(images)
        return {2: 3.1, 8: 3.0}.get(images, 3 + 0.05 * images)  # the first two are alike but for noise

    monkeypatch.setattr(module, "_timed", timed)
    assert module._pace(lambda images: None, 1e6, 512, ALONE, budget=2.0).images == 32
    assert max(asked) == 32


def test_what_takes_many_budgets_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "_timed", lambda step, images, parallel: asked.append(images) or 60.0)
    assert module._pace(lambda images: None, 1e6, 128, ALONE, budget=2.0).operations_per_second == 2e6 / 60
    assert asked == [2]
