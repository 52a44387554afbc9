"""Configs are values: checked when made, comparable, and the same after a round trip."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from dircluster import config as c
from dircluster.presets import PRESETS, RUNS, preset
from dircluster.presets import dir as d


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: d.MaskingConfig(ratio=50), "masking.ratio must lie in (0, 1), got 50; did you mean 0.5?"),
        (lambda: c.AttackConfig(epsilon=8), "attack.epsilon must lie in (0, 1), got 8; did you mean 8/255?"),
        (lambda: c.AttackConfig(epsilon=1.0), "attack.epsilon must lie in (0, 1), got 1"),
        (lambda: c.AttackConfig(norm="l2", epsilon=0), "attack.epsilon must be positive, got 0"),
        (lambda: c.AttackConfig(norm="l2", step_size=-1), "attack.step_size must be positive, got -1"),
        (lambda: d.ModelConfig(width=10, heads=3), "model.width must be a multiple of model.heads"),
        (lambda: d.ModelConfig(mlp_ratio=0.005), "model.mlp_ratio 0.005 leaves an MLP of width 192 without hidden"),
        (lambda: d.DirConfig(alpha=-1), "dir.alpha must be 0 or more, got -1"),
        (lambda: c.DataConfig(name="custom"), "data.uri is missing"),
        (lambda: c.TargetConfig(architecture="resnet19"), "target.architecture must be"),
        (lambda: c.TargetConfig(mean=(0.5,), std=(1e-12,)), "target.std must lie in [1e-05, 1], got 1e-12"),
        (lambda: c.TargetConfig(mean=(0.5,), std=(51.0,)), "target.std must lie in [1e-05, 1], got 51; did you mean"),
        (lambda: c.TrackingConfig(experiment=""), "tracking.experiment must be a name, got ''"),
        (lambda: c.TrackingConfig(experiment=" "), "tracking.experiment must be a name, got ' '"),
        (lambda: c.TrackingConfig(experiment="x" * 257), "tracking.experiment must be at most 256 characters"),
        (lambda: c.TrackingConfig(patience=-5), "tracking.patience must be 0 or more, got -5"),
        (lambda: c.TrackingConfig(patience=1e10), "tracking.patience must be at most 1e+09 seconds, got 1e+10"),
        (lambda: c.StorageConfig(patience=1e10), "storage.patience must be at most 1e+09 seconds, got 1e+10"),
        (lambda: c.ScalingConfig(stall=1e300), "scaling.stall must be at most 1e+09 seconds, got 1e+300"),
        (lambda: c.ScalingConfig(wait=1e300), "scaling.wait must be at most 1e+09 seconds, got 1e+300"),
        (lambda: c.StorageConfig(uri="gs://bucket/runs"), "storage.uri must be a folder or s3://BUCKET/PREFIX"),
        (lambda: c.StorageConfig(uri="s3:/bucket/runs"), "storage.uri must be a folder or s3://BUCKET/PREFIX"),
        (lambda: c.RunConfig(target=c.TargetConfig(optimizer=c.OptimizerConfig(lr=0))), "target.optimizer.lr must be"),
        (lambda: c.ScalingConfig(threads=100_000), "scaling.threads must lie in [1, 1024], got 100000"),
        (lambda: c.DataConfig(crop_padding=100_000), "data.crop_padding must lie in [0, 8), the images' shorter side"),
        *(
            (lambda name=name: c.RunConfig(name=name), "name must be of letters, digits and any of _ . + = - and")
            for name in ("", "a/b", "a:b", "it's", 'a"b', "a`b", "a\nb", "..", "-a", "a@b", "a" * 101)
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(c.ConfigError) as refusal:
        make()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("lr", 0.0, "must be positive, got 0.0"),
        ("momentum", 1.0, "must lie in [0, 1), got 1.0"),
        ("beta2", -0.1, "must lie in [0, 1), got -0.1"),
        ("gamma", 2.0, "must lie in (0, 1], got 2.0"),
        ("weight_decay", -1.0, "must be 0 or more, got -1.0"),
        ("warmup_epochs", -1.0, "must be 0 or more, got -1.0"),
        ("clip", 0.0, "must be positive, got 0.0"),
        ("milestones", (0, 9), "must be positive, got (0, 9)"),
        ("milestones", (9, -5), "must be positive, got (9, -5)"),
    ],
)
def test_an_error_says_which_optimizer_it_is_of(setting: str, value: object, message: str) -> None:
    """Of every optimizer of every defense."""
    for run in (kind() for kind in RUNS.values()):
        names = [name.rpartition(".")[0] for name in c.flatten(c.to_dict(run)) if name.endswith(".gamma")]
        assert "target.optimizer" in names
        for name in names:
            with pytest.raises(c.ConfigError) as refusal:
                c.with_values(run, {f"{name}.{setting}": value})
            assert str(refusal.value) == f"{name}.{setting} {message}"


def test_a_warm_up_must_end_before_its_stage_does() -> None:
    """Of a run that is to be trained; one that was is read as it is."""
    run, longest = preset("digits"), "must be less than the {} epochs of its stage, or the rate never falls, got {}"
    with pytest.raises(c.ConfigError, match=rf"^target\.optimizer\.warmup_epochs {longest.format(9, 9)}$"):
        c.check_schedules(c.with_values(run, {"target.epochs": 9}))
    with pytest.raises(c.ConfigError, match=rf"^dir\.optimizer\.warmup_epochs {longest.format(36, 40.5)}$"):
        c.check_schedules(c.with_values(run, {"dir.optimizer.warmup_epochs": 40.5}))
    last = {"ebm.last_epochs": 4, "ebm.last_optimizer.warmup_epochs": 4, "ebm.last_optimizer.schedule": "cosine"}
    with pytest.raises(c.ConfigError, match=r"^ebm\.last_optimizer\.warmup_epochs must be less than the 4 epochs"):
        c.check_schedules(c.with_values(preset("cifar10_ebm"), last))
    rising = {"target.epochs": 9, "target.optimizer.schedule": "constant"}
    no_stage = {"target.epochs": 9, "target.uri": "zoo:digits-at"}, {"pretrain.epochs": 0}
    joint = {"dir.joint": True, "pretrain.epochs": 0, "target.epochs": 5}
    for fine in ({"target.epochs": 10}, rising, joint, *no_stage):
        c.check_schedules(c.with_values(run, fine))


@dataclasses.dataclass(frozen=True)
class Gan:
    epochs: int = 3
    generator: c.OptimizerConfig = c.OptimizerConfig(warmup_epochs=3)


@dataclasses.dataclass(frozen=True)
class GanRun(c.RunConfig):
    gan: Gan = Gan()


def test_an_optimizer_may_be_called_anything() -> None:
    with pytest.raises(c.ConfigError, match=r"^gan\.generator\.warmup_epochs must be less than the 3 epochs"):
        c.check_schedules(GanRun())


@pytest.mark.parametrize("name", PRESETS)
def test_the_schedules_of_presets_work(name: str) -> None:
    c.check_schedules(PRESETS[name]())


def test_a_patch_must_divide_the_image() -> None:
    with pytest.raises(c.ConfigError, match=r"model.patch must divide data.height 32, got 3; try 2"):
        dataclasses.replace(preset("cifar10"), model=d.ModelConfig(patch=3))


def test_masks_must_see_every_patch() -> None:
    with pytest.raises(c.ConfigError, match=r"leaves patches unseen .* use masking.count 4 or more"):
        dataclasses.replace(preset("cifar10"), masking=d.MaskingConfig(ratio=0.7, count=3))
    with pytest.raises(c.ConfigError, match=r"masking.ratio 0.999 keeps none of 256 patches"):
        dataclasses.replace(preset("cifar10"), masking=d.MaskingConfig(ratio=0.999))
    with pytest.raises(c.ConfigError, match=r"ratio 0.997 takes 334 masks of 256 patches; .* give masking.count 256"):
        dataclasses.replace(preset("cifar10"), masking=d.MaskingConfig(ratio=0.997))
    assert dataclasses.replace(preset("cifar10"), masking=d.MaskingConfig(ratio=0.997, count=256))


def test_every_number_must_be_finite() -> None:
    with pytest.raises(c.ConfigError, match=r"dir.alpha must be finite, got inf"):
        dataclasses.replace(preset("digits"), dir=d.DirConfig(alpha=float("inf")))


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x85", "\udce9"])
@pytest.mark.parametrize("name", ["target.uri", "storage.uri", "tracking.experiment"])
def test_a_character_that_no_terminal_and_no_file_shows_is_refused(name: str, character: str) -> None:
    with pytest.raises(c.ConfigError, match=f"{name} holds a character that cannot be shown, got ") as refusal:
        c.with_values(preset("digits"), {name: f"a{character}b"})
    assert str(refusal.value).isprintable()


def test_every_worker_has_an_image_of_a_batch() -> None:
    with pytest.raises(c.ConfigError, match=r"training.batch_size must be at least scaling.workers 200"):
        dataclasses.replace(preset("digits"), scaling=c.ScalingConfig(workers="1:200"))


@pytest.mark.parametrize(("workers", "least", "most"), [(2, 2, 2), ("3", 3, 3), ("1:4", 1, 4)])
def test_workers_are_a_number_or_a_range(workers: int | str, least: int, most: int) -> None:
    scaling = c.ScalingConfig(workers=workers)
    assert (scaling.least, scaling.most) == (least, most)


@pytest.mark.parametrize(
    ("workers", "device", "cpus", "gpus", "count"),
    [
        ("1:4", "auto", 2, 0, 2),
        ("1:4", "auto", 16, 0, 4),
        ("1:4", "auto", 16, 1, 1),
        ("1:4", "cpu", 16, 1, 4),
        ("2:4", "auto", 16, 1, 4),  # not one GPU for each of two
        ("1:4", "gpu", 16, 2, 2),
        ("1:4", "gpu", 16, 0, 1),  # whoever starts it refuses it
        (3, "auto", 2, 0, 3),
    ],
)
def test_a_machine_has_the_workers_that_fit(workers: int | str, device: Any, cpus: int, gpus: int, count: int) -> None:
    assert c.ScalingConfig(workers=workers, device=device).workers_on(cpus, gpus) == count


@pytest.mark.parametrize("change", [{"data.uri": "s3://"}, {"target.uri": "s3:///target.safetensors"}])
def test_object_storage_without_a_bucket_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(c.ConfigError, match=r"uri must name a bucket, s3://BUCKET/PREFIX, got 's3:"):
        c.with_values(preset("digits"), change)


@pytest.mark.parametrize("workers", [0, "4:1", "two", "1:", ":2", "-1", "1.5"])
def test_other_workers_are_refused(workers: int | str) -> None:
    with pytest.raises(c.ConfigError, match=r"scaling.workers must be a number from 1, or LEAST:MOST"):
        c.ScalingConfig(workers=workers)


@pytest.mark.parametrize(
    "change",
    [
        {"storage": c.StorageConfig(uri="s3://key:CANARY@bucket/runs")},
        {"storage": c.StorageConfig(uri="s3://bucket/runs", endpoint="http://key:CANARY@host")},
        {"data": c.DataConfig(uri="s3://key:CANARY@bucket/data")},
        {"target": c.TargetConfig(uri="s3://key:CANARY@bucket/target.safetensors")},
        {"tracking": c.TrackingConfig(uri="postgresql://user:CANARY@host/mlflow")},
        {"tracking": c.TrackingConfig(uri="postgresql://host/mlflow?user=me&password=CANARY")},
        {"storage": c.StorageConfig(uri="s3://akia:CAN/CANARY@bucket/runs")},
        {"storage": c.StorageConfig(endpoint="https://host/?X-Amz-Date=1&X-Amz-Security-Token=CANARY")},
        {"tracking": c.TrackingConfig(uri="https://host/?api_key=CANARY")},
        {"tracking": c.TrackingConfig(uri="https://host/mlflow?sv=1&sig=CANARY")},
    ],
)
def test_a_uri_with_a_password_is_refused_without_repeating_it(change: dict[str, Any]) -> None:
    with pytest.raises(c.ConfigError, match="must not hold a user or password") as refusal:
        dataclasses.replace(preset("digits"), **change)
    assert "CANARY" not in str(refusal.value)


@pytest.mark.parametrize(("ratio", "masks"), [(0.3, 2), (0.5, 2), (0.7, 4), (0.75, 4), (0.9, 10)])
def test_the_fewest_masks_that_cover_an_image(ratio: float, masks: int) -> None:
    assert d.MaskingConfig(ratio=ratio).masks == masks


@pytest.mark.parametrize(("ratio", "tokens", "kept"), [(0.9, 15, 2), (0.7, 5, 2), (0.9, 25, 2), (0.5, 64, 32)])
def test_a_mask_keeps_the_even_number_where_a_half_is_left(ratio: float, tokens: int, kept: int) -> None:
    assert d.MaskingConfig(ratio=ratio).kept(tokens) == kept


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_a_round_trip(name: str) -> None:
    run = preset(name)
    assert c.from_dict(type(run), c.to_dict(run)) == run
    assert hash(run) == hash(preset(name))


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(c.ConfigError, match="MaskingConfig has no field rato"):
        c.from_dict(d.DirRun, {"masking": {"rato": 0.5}})


def test_identity_leaves_out_where_it_runs() -> None:
    run = preset("digits")
    elsewhere = dataclasses.replace(
        run, scaling=c.ScalingConfig(workers=2), storage=c.StorageConfig(uri="elsewhere"), name="mine"
    )
    assert elsewhere.identity == run.identity
    assert dataclasses.replace(run, seed=1).identity != run.identity


def test_the_papers_settings() -> None:
    run = preset("cifar10")
    assert (run.attack.epsilon, run.attack.step, run.attack.steps) == (8 / 255, 2 / 255, 5)
    assert (run.dir.alpha, run.dir.epochs, run.pretrain.epochs, run.training.batch_size) == (2.0, 90, 20, 128)
    assert run.pretrain.optimizer.lr == pytest.approx(1.5e-4 * 128 / 256)


def test_the_radius_and_the_step_of_an_l2_threat() -> None:
    attack = c.AttackConfig(norm="l2", epsilon=2.0)
    assert (attack.step, attack.step_for(20)) == (2.5 * 2.0 / 5, 2.5 * 2.0 / 20)
    assert c.AttackConfig(norm="l2", epsilon=2.0, step_size=1.5).step_for(20) == 1.5
    assert [c.AttackConfig().step_for(steps) for steps in (1, 5, 200)] == [2 / 255] * 3


def test_cifar100_is_cifar10_with_other_data() -> None:
    run, usual = preset("cifar100"), preset("cifar10")
    assert (run.data.name, run.data.classes, run.data.channels, run.data.height) == ("cifar100", 100, 3, 32)
    assert dataclasses.replace(run, name=usual.name, data=usual.data) == usual
    assert dataclasses.replace(run.data, name="cifar10", classes=10) == usual.data
    smoke = preset("cifar100_smoke")
    assert (smoke.name, smoke.data.classes, smoke.data.limit) == ("cifar100_smoke", 100, 48)
    assert dataclasses.replace(smoke, name="x", data=usual.data) == dataclasses.replace(
        preset("cifar10_smoke"), name="x", data=usual.data
    )


def test_schedules() -> None:
    step = c.OptimizerConfig(lr=1.0, milestones=(75, 90))
    assert [step.rate(epoch, 110) for epoch in (1, 74.9, 75, 90)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = c.OptimizerConfig(lr=1.0, schedule="cosine", warmup_epochs=2)
    assert [cosine.rate(epoch, 12) for epoch in (1, 2, 7, 12)] == pytest.approx([0.5, 1, 0.5, 0])
    assert c.OptimizerConfig(lr=0.3, schedule="constant").rate(50, 90) == 0.3


def test_a_query_that_is_no_secret_is_kept() -> None:
    address = "https://host/mlflow?tokenizer=a&signature_version=s3v4&sslmode=require"
    assert c.TrackingConfig(uri=address).uri == address


def test_an_error_is_one_line_whatever_it_names() -> None:
    error = c.ConfigError("--config a\nb\r\x1b[31m é\ud800 cannot be read")
    assert str(error) == r"--config a\nb\r\x1b[31m é\ud800 cannot be read"
    assert str(pickle.loads(pickle.dumps(error))) == str(c.error_from_plain(c.error_to_plain(error))) == str(error)


@pytest.mark.parametrize("name", ["nope.x", "seed.x", "nope"])
def test_a_value_for_what_is_no_setting_is_refused(name: str) -> None:
    with pytest.raises(c.ConfigError, match=f"^RunConfig has no (setting|field) {name}$"):
        c.with_values(c.RunConfig(), {name: 1})
