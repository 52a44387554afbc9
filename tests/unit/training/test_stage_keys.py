"""What decides a stage's weights: keys that later settings leave as they are, so that stored stages are found again."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dircluster import cli
from dircluster.config import (
    LATER_FIELDS,
    SAME_NUMBERS,
    AttackConfig,
    ConfigError,
    EvaluationConfig,
    RunConfig,
    as_hashed,
    digest,
    flatten,
    to_dict,
    with_values,
)
from dircluster.defenses.base import AdaptiveAttack
from dircluster.evaluation.adaptive import adaptive_specs
from dircluster.evaluation.gradient_masking import check_specs
from dircluster.evaluation.suites import SUITES, SuiteName, suite
from dircluster.presets import PRESETS, preset
from dircluster.presets.dir import DirRun
from dircluster.training.protocols import NoTracker, Quiet
from dircluster.training.run import Run
from dircluster.training.stages import find_stage, stage_key, stage_settings, stages_of
from tests.conftest import ALONE

INPUTS: dict[str, str | None] = {"data": "0" * 64}
NEWER = ("cifar10_fast", "cifar10_small", "cifar10_joint_", "digits_", "cifar10_jatp", "svhn_jatp")
"""Presets younger than these settings."""
KEYS = {  # computed at d27d5de, before there were other norms than linf
    "digits": {
        "target": "945442285bea522d34201950766909899d67d73739a9ee9cf28e8283b004ff6e",
        "pretrain": "09cfbe6fc64f6c14e836f5e2716f6e314ed5cf12098a89eb71b2abc35d3e9a55",
        "dir": "711125cd815c7ac1123dcb3e1b5329c1ba805c73d4c942d9788ab1a9e4eb11cb",
    },
    "cifar10": {
        "target": "f95258acb3f8a869bd579ee011beaaec6d9f271e01aec35192a033a8dcfe9fef",
        "pretrain": "f069508def346c000a77579d5bc37af8f1772424680775e96023896f7da4e380",
        "dir": "b6943747a9de34c66579a239138b051415bdb466a5ba4b56796481b4ddf14a21",
    },
    "digits_hgd": {"hgd": "db537b4dc27b6c6b1e7dbaafbdf5a2912d71d4ca7a711222e6a6558364d8901f"},  # computed at f908ee0
    "cifar10_nrp_a": {  # computed at 15e9388
        "nrp": "1e759a41684dc856494608887d8e7d542eeb775b09ba5ff39f214632196edc68",
        "nrp_a": "fb6879fccfb279cc0bb51b607bacbf643af7cefa56d06a27e7e9dc0d770c9c49",
    },
    "cifar10_apegan_a": {  # computed at 15e9388
        "apegan": "f1c8622b8ec51f03427c1512a674cb1596c22bd0a60d1288f0eb982ec6706591",
        "apegan_a": "a350880f3ccd186c429efe78c40f5f5a999b51fea687c001799b2bf632e8db52",
    },
    "cifar10_joint": {"dir": "d6412af9c087a0958f7239e54a6608752b86a3d3204ba378b602fcb90c329313"},
    "digits_smoke": {
        "target": "6bdb9a71dacfe5124ce13625d2ae65b0ec35034c34f83fac14d70861e73a9b26",
        "pretrain": "56a35a95f7a49e5fca560bd02104019a43e252b16a5e3588c79d4dc10ecc8d3e",
        "dir": "cc57614f019b4a5bbfdb9c7880e0f46a1a6512522983638f8ccf95148e0459b7",
    },
}


SLOW: dict[str, object] = {
    "attack.training_step_size": None,
    "attack.crafting": "pgd",
    "target.ema": None,
    "target.optimizer.weight_decay": 1e-4,
    "dir.alpha": 2.0,
    "dir.perturb_step_size": None,
    "dir.keep": "best",
    "dir.ema": None,
}
"""What ``digits`` was before it took fast crafting, in all of its sizes."""
BEFORE: dict[str, dict[str, object]] = {
    "digits_smoke": SLOW,
    "digits_hgd": {"attack.steps": 5, "attack.training_step_size": None},
    "digits": SLOW
    | {
        "attack.steps": 5,
        "target.epochs": 150,
        "target.optimizer.lr": 2e-3,
        "target.optimizer.warmup_epochs": 15,
        "pretrain.epochs": 20,
        "dir.epochs": 60,
        "dir.optimizer.warmup_epochs": 6,
        "dir.perturb_steps": 5,
    },
}


def earlier(name: str) -> RunConfig:
    """The preset as it was when KEYS were computed."""
    return with_values(preset(name), BEFORE.get(name, {}))


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, keys in KEYS.items() for stage in keys])
def test_stages_stored_by_earlier_versions_are_found(name: str, stage: str) -> None:
    assert stage_key(earlier(name), find_stage(earlier(name), stage), INPUTS) == KEYS[name][stage]


@pytest.mark.parametrize("stage", ["target", "pretrain", "dir"])
def test_another_norm_is_another_stage(stage: str) -> None:
    run = preset("digits")
    other = replace(run, attack=replace(run.attack, norm="l2", step_size=run.attack.step))
    assert stage_key(other, find_stage(other, stage), INPUTS) != stage_key(run, find_stage(run, stage), INPUTS)
    assert flatten(stage_settings(run, find_stage(run, stage)))["attack.norm"] == "linf"  # what MLflow shows is whole


@pytest.mark.parametrize(
    ("name", "stages", "setting", "value"),
    [
        ("cifar10_nrp_a", {"nrp", "nrp_a"}, "model.clamp", True),
        ("cifar10_apegan_a", {"apegan", "apegan_a"}, "apegan.keep", "last"),
    ],
)
def test_another_form_of_a_system_is_another_stage(name: str, stages: set[str], setting: str, value: object) -> None:
    run = preset(name)
    other = keys(with_values(run, {setting: value}))
    assert {stage for stage, key in keys(run).items() if other[stage] != key} == stages | {"run"}


def test_other_classes_are_other_stages() -> None:
    run = preset("digits_hgd")
    other = keys(with_values(run, {"data.classes": 12}))
    assert not {stage for stage, key in keys(run).items() if other[stage] == key}


def test_naturally_trained_targets_that_were_chosen_under_attack_are_not_reused() -> None:
    """Under attack a natural target is best while it has hardly learned; by its key at d27d5de it was kept so."""
    run = with_values(earlier("digits"), {"target.objective": "natural"})
    stage = find_stage(run, "target")
    assert (stage.keep, find_stage(earlier("digits"), "target").keep) == ("last", "best")
    plain = stage_settings(run, stage)
    assert plain.pop("revision") == 2
    before = digest({"format": 2, "stage": "target", "inputs": INPUTS, **as_hashed(plain, LATER_FIELDS)})
    assert stage_key(run, stage, INPUTS) != before
    assert stage_key(run, replace(stage, revision=1), INPUTS) == before
    more = with_values(preset("digits_finetune"), {"target.objective": "natural"})
    assert find_stage(more, "finetune").keep == "last"


def test_only_defaults_of_later_settings_are_left_out() -> None:
    plain = to_dict(AttackConfig())
    assert as_hashed({"attack": plain}, LATER_FIELDS) == {
        "attack": {k: v for k, v in plain.items() if f"attack.{k}" not in LATER_FIELDS}
    }
    assert {"norm", "crafting"} <= {name.removeprefix("attack.") for name in LATER_FIELDS}
    assert as_hashed({"attack": {**plain, "norm": "l2"}}, LATER_FIELDS)["attack"]["norm"] == "l2"
    others = {"norm": "linf", "dir": {"norm": "linf"}}
    assert as_hashed(others, LATER_FIELDS) == others


@pytest.mark.parametrize("field", SAME_NUMBERS)
def test_how_a_number_is_computed_is_in_no_key(field: str) -> None:
    other = with_values(earlier("digits"), {field: "on"})
    for stage in ("target", "pretrain", "dir"):
        assert stage_key(other, find_stage(other, stage), INPUTS) == KEYS["digits"][stage]
        assert field in flatten(stage_settings(other, find_stage(other, stage)))


def test_runs_of_one_stage_record_the_same_settings() -> None:
    """MLflow refuses a record whose settings change."""
    one, other = preset("digits"), with_values(preset("digits"), dict.fromkeys(SAME_NUMBERS, "on"))
    stage = find_stage(one, "dir")
    shown = Run(one, ALONE, NoTracker(), Quiet())._facts(stage)
    assert Run(other, ALONE, NoTracker(), Quiet())._facts(stage) == shown
    assert shown["attack.norm"] == "linf"  # keys leave it out


def test_a_switch_of_three_words_has_the_keys_that_it_had_of_two() -> None:
    compiled = "07f66e1a612b4cd1be4f5738fbbb2785a5f28482311633be4a43dfa6d6fe92c6"  # computed at 15e9388
    for word, wanted in (("auto", KEYS["digits"]["dir"]), ("off", KEYS["digits"]["dir"]), ("on", compiled)):
        run = with_values(earlier("digits"), {"training.compile": word})
        assert stage_key(run, find_stage(run, "dir"), INPUTS) == wanted
        assert run.identity["training"]["compile"] is (word == "on")


@pytest.mark.parametrize("name", ["compile", "fused", "draws_ahead", "capture"])
def test_a_switch_of_three_words_is_no_truth_value(name: str) -> None:
    values: dict[str, Any] = {name: True}
    with pytest.raises(ConfigError, match=rf"training\.{name} must be auto, on or off, got True"):
        replace(preset("digits").training, **values)


@pytest.mark.parametrize("name", PRESETS)
def test_later_settings_are_settings(name: str) -> None:
    run = preset(name)
    later = {**LATER_FIELDS, **run.later}
    assert set(later) <= set(flatten(to_dict(run)))
    del later["data.classes"]  # older than its part in keys: those of other numbers of classes have changed
    if not name.startswith(NEWER):
        before = earlier(name) if name in BEFORE else run
        assert with_values(before, later) == before  # an older one has their defaults, or its keys had changed


def keys(run: RunConfig) -> dict[str, str]:
    """The keys of all stages of a run, and of the run as sweeps and records know it."""
    found = {stage.name: stage_key(run, stage, INPUTS) for stage in stages_of(run)}
    return found | {"run": digest(run.identity)}


@pytest.mark.long
@pytest.mark.parametrize("name", PRESETS)
def test_the_same_settings_are_the_same_run_however_they_are_typed(name: str, tmp_path: Path) -> None:
    run = preset(name)
    (tmp_path / "run.yaml").write_text(cli.to_yaml(run))
    assert keys(cli.parse(cli.TrainJob, [name, "--config", str(tmp_path / "run.yaml")]).run) == keys(run)
    numbers = {field: value for field, value in flatten(to_dict(run)).items() if isinstance(value, int | float)}
    decimal = {field: float(value) for field, value in numbers.items() if field.endswith("warmup_epochs")}
    whole = {field: int(v) for field, v in numbers.items() if isinstance(v, float) and v.is_integer()}
    signed = {field: -0.0 for field, value in numbers.items() if isinstance(value, float) and value == 0}
    assert decimal
    assert whole
    assert signed
    for forms in (decimal, whole, signed):
        assert keys(with_values(run, forms)) == keys(run), forms


@dataclass(frozen=True)
class Derived:
    """What a setting is by itself, another value, and the settings under which it is read."""

    value: object
    other: object
    base: dict[str, object] = field(default_factory=dict)


def _evaluation(name: str) -> Callable[[RunConfig], Derived | None]:
    def derived(run: RunConfig) -> Derived | None:
        value = run.evaluation.derived.get(name)
        base: dict[str, object] = {"evaluation.suite": "paper"} if name in ("resubmissions", "votes") else {}
        return None if value is None else Derived(value, 3 * value, base)

    return derived


def _select_steps(run: RunConfig) -> Derived | None:
    steps = run.attack.steps
    return Derived(steps, 2 * steps) if run.attack.step == run.attack.step_for(steps) else None


def _beta(run: RunConfig) -> Derived | None:
    if run.defense == "menet":  # which has no such term
        return None
    return Derived(6.0, 12.0, {"target.objective": "trades", **({"dir.alpha": 0.0} if _joint(run) else {})})


def _joint(run: RunConfig) -> bool:
    return isinstance(run, DirRun) and run.dir.joint


def _perturb_step_size(run: RunConfig) -> Derived | None:
    assert isinstance(run, DirRun)
    if run.dir.joint and run.target.objective != "at":  # Eq. 4 is not asked
        return None
    size = run.attack.step_for(run.dir.perturb_steps)
    return Derived(size, 2 * size)


def _masks(run: RunConfig) -> Derived:
    assert isinstance(run, DirRun)
    return Derived(run.masking.masks, 2 * run.masking.masks)


DERIVED: dict[str, Callable[[RunConfig], Derived | None]] = {
    "attack.step_size": lambda run: Derived(run.attack.epsilon / 4, run.attack.epsilon / 2),
    "attack.training_step_size": lambda run: Derived(run.attack.step, 2 * run.attack.step),
    "target.beta": _beta,
    "target.awp": lambda run: None if run.defense == "menet" or _joint(run) else Derived(0.0, 0.5),
    "target.ema": lambda run: None if _joint(run) else Derived(0.0, 0.5),
    "training.microbatch": lambda run: Derived(run.training.batch_size, run.training.batch_size // 2),
    "training.select_steps": _select_steps,
    "evaluation.rows": lambda run: Derived(256, 512),
    **{
        f"evaluation.{name}": _evaluation(name)
        for name in ("steps", "restarts", "eot", "draws", "resubmissions", "votes")
    },
    "masking.count": _masks,
    "dir.perturb_step_size": _perturb_step_size,
    "dir.ema": lambda run: Derived(0.0, 0.5),
}
"""Settings that are None by themselves and mean a value then: a run that has none of that value gives None."""
NO_VALUE = {
    *("data.uri", "data.label_column", "data.image_column", "data.limit", "target.uri", "target.entry"),
    *("target.mean", "target.std"),  # each by itself is no setting
    *("evaluation.images", "evaluation.sample"),
    *("scaling.threads", "storage.endpoint", "storage.region", "tracking.uri"),
}
"""Those that mean no value that settings alone could say; ``clip`` of any optimizer too."""


def names_of_none(run: RunConfig) -> set[str]:
    """Settings that are None in ``run`` or in what its kind of run has by itself."""
    plain = [flatten(to_dict(each)) for each in (run, type(run)())]
    return {name for each in plain for name, value in each.items() if value is None}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("_smoke") else []) for name in PRESETS]
)
def test_a_value_given_is_the_same_value_derived(name: str) -> None:
    run = preset(name)
    empty = {name for name in names_of_none(run) if not name.endswith(".clip")}
    assert empty <= {*DERIVED, *NO_VALUE}, "say what a new setting means that is None by itself"
    for name in empty & set(DERIVED):
        bare = with_values(run, {name: None})
        derived = DERIVED[name](bare)
        if derived is not None:
            bare = with_values(bare, derived.base)
            assert keys(with_values(bare, {name: derived.value})) == keys(bare), name
            assert keys(with_values(bare, {name: derived.other})) != keys(bare), name


def test_the_settings_that_presets_were_first_given_mean_what_they_meant() -> None:
    run = preset("cifar10")
    half = {"target.mean": (0.5,) * 3, "target.std": (0.5,) * 3}
    assert keys(with_values(run, half)) == keys(run)
    assert keys(with_values(run, half | {"target.std": (0.25,)})) != keys(run)
    fast = preset("digits")  # its samples are crafted by larger steps than it is judged by
    assert keys(with_values(fast, {"training.select_steps": fast.attack.steps})) != keys(fast)


@dataclass(frozen=True)
class Unread:
    """Settings, or whole sections, that nothing reads under ``base``, and settings under which each is read."""

    names: tuple[str, ...]
    base: dict[str, object]
    read: dict[str, object] = field(default_factory=dict)
    of: str = "cifar10"
    """A preset that has them."""


JOINT = {"dir.joint": True, "pretrain.epochs": 0, "target.uri": None}
GIVEN = {"target.uri": "weights.safetensors"}
UNREAD = (
    Unread(("dir.target_optimizer",), {"dir.joint": False}, JOINT),
    Unread(("pretrain.optimizer",), {"pretrain.epochs": 0}, {"pretrain.epochs": 3}),
    Unread(("target.epochs", "target.ema", "target.optimizer"), JOINT, {"dir.joint": False}),
    Unread(("target.trades_steps",), {**JOINT, "target.objective": "trades", "dir.alpha": 0.0}, {"dir.joint": False}),
    Unread(
        ("dir.perturb_steps", "dir.perturb_step_size"),
        {**JOINT, "target.objective": "mart", "dir.alpha": 0.0, "dir.mse_weight": 0.0},
        {"target.objective": "at"},
    ),
    Unread(("target.epochs", "target.ema", "target.optimizer"), GIVEN, {"target.uri": None}),
    Unread(("target.objective", "target.awp"), GIVEN, {"target.uri": None}),
    Unread(
        ("target.beta", "target.trades_steps"),
        {**GIVEN, "target.objective": "trades"},
        {"target.uri": None},
    ),
    Unread(("target.architecture",), {"target.uri": "timm:test_vit"}, GIVEN),
    Unread(("ebm.last_optimizer",), {"ebm.last_epochs": 0}, {"ebm.last_epochs": 3}, of="cifar10_ebm"),
    Unread(
        ("model.shrinkage", "model.weight", "model.iterations", "model.tolerance"),
        {"model.method": "usvt"},
        of="cifar10_menet",
    ),
    Unread(("model.rank", "model.weight"), {"model.method": "soft_impute"}, of="cifar10_menet"),
    Unread(("model.rank", "model.shrinkage"), {"model.method": "nuclear_norm"}, of="cifar10_menet"),
    Unread(("model.growth",), {"model.network": "resg"}, {"model.network": "rrdb"}, of="cifar10_nrp"),
    Unread(("target.trades_steps", "target.beta"), {"target.objective": "at"}, {"target.objective": "trades"}),
    Unread(("target.trades_steps",), {"target.objective": "mart"}, {"target.objective": "trades"}),
    Unread(("attack.pipeline_steps",), {"attack.crafting": "pgd"}, {"attack.crafting": "straight_through"}),
    *(
        Unread(
            (f"{section}.milestones", f"{section}.gamma"),
            {f"{section}.schedule": form},
            {f"{section}.schedule": "step"},
        )
        for section, form in (("pretrain.optimizer", "cosine"), ("dir.optimizer", "constant"))
    ),
    Unread(("target.optimizer.gamma",), {"target.optimizer.milestones": ()}, {"target.optimizer.milestones": (75,)}),
    Unread(("target.optimizer.milestones",), {"target.optimizer.gamma": 1.0}, {"target.optimizer.gamma": 0.1}),
    Unread(("data.resize",), {"data.uri": None}, {"data.uri": "/somewhere"}),
    Unread(("target.entry",), {"target.uri": None}, {"target.uri": "/somewhere/weights.pt"}),
    Unread(("target.optimizer.beta2",), {"target.optimizer.name": "sgd"}, {"target.optimizer.name": "adam"}),
    Unread(("evaluation.verdict_images",), {"evaluation.verdict": False}, {"evaluation.verdict": True}),
    Unread(
        ("evaluation.queries",),
        {"evaluation.suite": "quick", "evaluation.verdict": False},
        {"evaluation.verdict": True},
    ),
    *(
        Unread(
            ("evaluation.votes", "evaluation.resubmissions"), {"evaluation.suite": name}, {"evaluation.suite": "paper"}
        )
        for name in ("quick", "autoattack")
    ),
    Unread(("evaluation.l2_epsilon",), {"evaluation.suite": "autoattack"}, {"evaluation.suite": "rigorous"}),
    Unread(("evaluation.l2_epsilon",), {"evaluation.suite": "paper"}, {"evaluation.suite": "rigorous"}),
    Unread(
        ("evaluation.l2_epsilon",),
        {"evaluation.suite": "rigorous", "attack.norm": "l2"},
        {"attack.norm": "linf"},
    ),
)
OTHERS: dict[str, object] = {
    "target.entry": "ema",
    "target.objective": "natural",
    "target.architecture": "wrn-28-10",
    "optimizer.name": "adam",
    "optimizer.schedule": "constant",
}


def other(name: str, value: object) -> object:
    """Another value of a setting that is called so."""
    known = [made for end, made in OTHERS.items() if name.endswith(end)]
    if known:
        return known[0]
    if isinstance(value, tuple | list):
        return [3, 4]
    if isinstance(value, bool):
        return not value
    return 0.375 if value is None or isinstance(value, float) else int(str(value)) + 1


def others(run: RunConfig, names: tuple[str, ...]) -> dict[str, object]:
    """Another value of each of these settings, and of all in sections that are called so."""
    wanted = tuple(f"{name}." for name in names)
    made = {name: other(name, value) for name, value in flatten(to_dict(run)).items() if f"{name}.".startswith(wanted)}
    return made | {name: 7 for name in ("evaluation.votes", "evaluation.resubmissions") if name in made}


def under(name: str, base: dict[str, object]) -> RunConfig | None:
    """The preset with ``base``; None where it has no such settings, or cannot have them."""
    try:
        return with_values(preset(name), base)
    except (ConfigError, KeyError):
        return None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("_smoke") else []) for name in PRESETS]
)
def test_what_nothing_reads_is_in_no_key(name: str) -> None:
    met = 0
    for row in UNREAD:
        run = under(name, row.base)
        changed = {} if run is None else others(run, row.names)
        if run is not None and run.defense == "finetune" and row.base.items() >= GIVEN.items():
            changed = {name: value for name, value in changed.items() if name.split(".")[1] in run.unread}
        if run is None or not changed:
            continue
        assert keys(with_values(run, changed)) == keys(run), row
        met += 1
    assert met >= 10


@pytest.mark.parametrize("row", [row for row in UNREAD if row.read], ids=lambda row: "-".join(row.names))
def test_what_is_read_is_in_a_key(row: Unread) -> None:
    run = with_values(preset(row.of), {**row.base, **row.read})
    for name in row.names:  # of a section its rate
        changed = others(run, (f"{name}.lr" if name.endswith("optimizer") else name,))
        assert keys(with_values(run, changed)) != keys(run), name


def test_milestones_are_the_same_in_any_order() -> None:
    run = preset("cifar10")
    assert run.target.optimizer.milestones == (75, 90)
    assert keys(with_values(run, {"target.optimizer.milestones": (90, 75)})) == keys(run)
    assert keys(with_values(run, {"target.optimizer.milestones": (75, 90, 90)})) != keys(run)  # twice is a tenth twice


def test_steps_that_change_no_rate_are_a_constant_rate() -> None:
    constant = with_values(preset("cifar10"), {"target.optimizer.schedule": "constant"})
    for same in ({"target.optimizer.milestones": ()}, {"target.optimizer.gamma": 1.0}):
        run = with_values(preset("cifar10"), same)
        assert keys(run) == keys(constant)
        found, wanted = run.target.optimizer, constant.target.optimizer
        assert [found.rate(epoch, 110) for epoch in range(110)] == [wanted.rate(epoch, 110) for epoch in range(110)]


@pytest.mark.parametrize("name", ["data.uri", "target.uri"])
def test_a_place_is_the_same_place_however_it_is_written(name: str) -> None:
    run = with_values(preset("digits"), {name: "/somewhere/there"})
    for address in ("file:///somewhere/there", "file://localhost/somewhere/there"):
        assert keys(with_values(run, {name: address})) == keys(run)
    assert keys(with_values(run, {name: "/somewhere/else"})) != keys(run)


KNOWN = (AdaptiveAttack("full", "exact", 50), AdaptiveAttack("bpda", "identity", 50, step=0.25, eot=15))
"""Attacks that know a purifier, which suites have beside their own."""


def asked_by(settings: EvaluationConfig) -> list[object]:
    """All attacks that an evaluation asks, of defenses of every kind and threats of both norms."""
    found: list[object] = []
    forms = itertools.product((AttackConfig(), AttackConfig(norm="l2", epsilon=0.5)), *[(False, True)] * 4)
    for attack, randomized, purifies, transfers, masked in forms:
        kind = {"randomized": randomized, "transfers": transfers}
        victim: Any = SimpleNamespace(randomized=randomized, adaptive=KNOWN)
        found.append(suite(settings.suite, attack, settings, **kind, purifies=purifies, masked=masked))
        found.append(adaptive_specs(victim, attack, settings))
        if settings.verdict:
            found.append(check_specs(attack, settings, **kind))
    return found


@pytest.mark.parametrize("verdict", [False, True])
@pytest.mark.parametrize("name", SUITES)
def test_what_an_evaluation_derives_asks_for_the_same_attacks(name: SuiteName, verdict: bool) -> None:
    bare = EvaluationConfig(suite=name, verdict=verdict)
    assert bare.derived
    for field_name, value in bare.derived.items():
        given = replace(bare, **{field_name: value})
        assert given.canonical == bare
        assert asked_by(given) == asked_by(bare), field_name
    for field_name in ("steps", "restarts", "eot", "draws"):
        for value in {1, 2, 4, 10, 16, 20, 30, 40, 50, 100, 200} - {bare.derived.get(field_name)}:
            given = replace(bare, **{field_name: value})
            assert given.canonical == given
            assert asked_by(given) != asked_by(bare), (field_name, value)


def test_how_samples_are_crafted_on_a_pipeline_decides_nothing_of_what_has_none() -> None:
    run = preset("digits")
    other = with_values(run, {"attack.crafting": "pgd", "attack.pipeline_steps": 1})
    same = {name for name, key in keys(run).items() if keys(other)[name] == key}
    assert same == {"target", "pretrain"}
    assert keys(preset("digits_hgd"))["target"] == keys(run)["target"]
