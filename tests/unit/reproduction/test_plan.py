"""What is trained for what is asked: shared trainings once, seeds, systems, schedules; settings that cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dircluster.cluster.sweeps.store import key_of
from dircluster.config import ConfigError, RunConfig
from dircluster.defenses.stage import Stage
from dircluster.presets import preset
from dircluster.reproduction.costs import Cost, by_kind, calibrated, costs, factor_for
from dircluster.reproduction.exhibits import LABELS, ONE_WORKER
from dircluster.reproduction.plan import Plan, make_plan, preset_of, shortened
from dircluster.reproduction.tables import NAMES, exhibits
from dircluster.training.costs import recipe_on_meta, step_operations
from dircluster.training.forecast import Calibration, Pace, Work
from dircluster.training.stages import stages_of
from tests.conftest import ALONE


def planned(
    *names: str, family: str = "digits", only: str = "", seeds: int = 1, factor: float = 1.0, **given: Any
) -> Plan:
    there = exhibits("cifar10")
    chosen = [there[name] for name in names]
    settings = {name.replace("__", "."): value for name, value in given.items()}
    return make_plan(chosen, family, settings, range(seeds), only.split(",") if only else (), key_of, factor)


@pytest.mark.parametrize("family", ["digits", "cifar10", "cifar10_small", "svhn"])
def test_a_table_takes_a_training_a_system(family: str) -> None:
    plan = planned("table1", family=family)
    names = [training.system.name for training in plan.trainings.values()]
    assert names == ["identity", "finetune", "apegan", "hgd", "nrp", "jatp", "dir"]
    assert {training.run.evaluation.suite for training in plan.trainings.values()} == {"paper"}
    targets = {training.stages["target"] for training in plan.trainings.values()}
    assert len(targets) == 1


def test_what_tables_share_is_trained_once() -> None:
    """BASELINES: set A (8 trainings, with T-tr and T-ma) is Table 1's top, Table 2 and more; here with controls."""
    plan = planned("table1", "table2", "fig4", "no-pretrain", family="cifar10")
    assert len(plan.trainings) == 7 + 4 + 1  # on TRADES' and MART's targets the two controls
    assert len(plan.transfers) == 10
    assert {t.run.evaluation.suite for t in plan.trainings.values() if t.system.name == "dir"} == {"paper", "quick"}


def test_the_usual_model_is_one_whatever_it_is_called() -> None:
    """Table 5's 8 + 2 is ratio 0.5, alpha 2 and the DIR of Table 1."""
    plan = planned("table1", "table5", "ratio", "fig6a", family="cifar10", only="dir")
    assert len(plan.trainings) == 1 + 5 + 2 + 5
    found = {plan.served[name, label] for name, label in (("table1", "DIR"), ("table5", "8 + 2"), ("fig6a", "alpha 2"))}
    assert len(found) == 1


def test_the_usual_model_of_the_digits_is_a_ratio_alone() -> None:
    """Its 2 + 1 blocks are no row of Table 5, its alpha 0.5 no point of Figure 6a (docs/reproduction.md)."""
    plan = planned("table1", "table5", "ratio", "fig6a", only="dir")
    assert plan.served["table1", "DIR"] == plan.served["ratio", "ratio 0.5"]
    assert len(plan.trainings) == 1 + 6 + 2 + 6
    small = planned("table1", "table5", family="cifar10_small", only="dir")
    assert small.served["table1", "DIR"] == small.served["table5", "4 + 1"]


def test_all_of_the_paper() -> None:
    plan = planned(*NAMES, family="cifar10")
    names = [training.system.name for training in plan.trainings.values()]
    # 37 of BASELINES less SVHN's 6; two controls at each of four targets, of which T-at, T-tr, T-ma and T-nat are one.
    assert len(names) - names.count("finetune") == 37 - 6
    assert names.count("finetune") == 4
    assert {t.preset.startswith("cifar10") for t in plan.trainings.values()} == {True}


def test_a_target_that_is_trained_on_costs_the_same_whatever_its_objective() -> None:
    plan = planned("table1", "table2", "table4", only="finetune", family="cifar10")
    runs = {t.run.target.objective: t.run for t in plan.trainings.values()}
    assert set(runs) == {"at", "trades", "mart", "natural"}
    assert runs["at"].finetune == preset("cifar10_finetune").finetune  # type: ignore[attr-defined]
    costs = {name: run.finetune.epochs * step_operations(run, "finetune") for name, run in runs.items()}  # type: ignore[attr-defined]
    assert list(costs.values()) == pytest.approx([costs["at"]] * 4, rel=0.03)


def test_seeds_and_only() -> None:
    plan = planned("table1", only="hgd,dir", seeds=3)
    assert [(t.system.name, t.seed) for t in plan.trainings.values()] == [
        (name, seed) for name in ("hgd", "dir") for seed in range(3)
    ]
    assert [line.label for line in plan.exhibits[0].lines] == ["HGD", "DIR"]
    assert len(plan.served["table1", "HGD"]) == 3
    with pytest.raises(ConfigError, match="leaves nothing of fig6b, which has identity, finetune, apegan_a"):
        planned("fig6b", only="menet")


def test_a_system_without_a_preset_is_one_line() -> None:
    with pytest.raises(ConfigError, match="there is no preset cifar10_small_menet: leave menet out by --only"):
        planned("table3", family="cifar10_small")
    assert len(planned("table3", family="cifar10_small", only="identity,finetune,jatp,dir").trainings) == 4


def test_settings_are_those_of_all_systems() -> None:
    plan = planned("table1", only="hgd,dir", evaluation__images=10)
    assert {t.run.evaluation.images for t in plan.trainings.values()} == {10}
    with pytest.raises(ConfigError, match=r"dir\.alpha is no setting of hgd"):
        planned("table1", only="hgd,dir", dir__alpha=1.0)


def test_what_one_worker_trains_has_one_and_the_others_all() -> None:
    """docs/reproduction.md gives table2 svhn --scaling.workers 4, which GANs and EBM cannot be trained by."""
    plan = planned("table2", "table3", "fig6b", family="svhn", scaling__workers=4)
    workers = {training.system.name: training.run.scaling.workers for training in plan.trainings.values()}
    alone = {"apegan", "nrp", "apegan_a", "nrp_a", "ebm"}
    others = {"identity", "finetune", "hgd", "jatp", "dir", "hgd_a", "menet", "menet_a"}
    assert workers == {**dict.fromkeys(alone, 1), **dict.fromkeys(others, 4)}
    assert {training.run.scaling.workers for training in planned("table1", scaling__workers=1).trainings.values()} == {
        1
    }


@pytest.mark.parametrize("system", LABELS)
def test_what_one_worker_trains_is_what_its_recipes_say(system: str) -> None:
    run = preset(preset_of("digits_smoke", system))
    alone = [stage.name for stage in stages_of(run) if recipe_on_meta(run, stage.name).alone]
    assert bool(alone) is (system in ONE_WORKER), alone


@pytest.mark.parametrize(
    ("family", "system", "expected"),
    [("digits", "dir", "digits"), ("digits_smoke", "hgd_a", "digits_hgd_a_smoke"), ("svhn", "ebm", "svhn_ebm")],
)
def test_presets_have_their_systems_names(family: str, system: str, expected: str) -> None:
    assert preset_of(family, system) == expected
    assert preset(expected).name == expected


def test_a_factor_shortens_all_that_counts_in_epochs() -> None:
    run: Any = shortened(preset("cifar10_hgd_a"), 0.1)
    assert (run.target.epochs, run.hgd.epochs, run.adversarial.epochs) == (11, 3, 3)
    assert run.target.optimizer.milestones == (8, 9)
    assert run.hgd.optimizer.milestones == (2, 3)
    made: Any = shortened(preset("digits"), 0.5)
    assert (made.target.epochs, made.pretrain.epochs, made.dir.epochs) == (45, 5, 18)
    assert (made.target.optimizer.warmup_epochs, made.training.select_every) == (4.5, 5)
    without: Any = shortened(preset("digits_ebm"), 0.001)
    assert (without.ebm.epochs, without.ebm.last_epochs) == (1, 0)
    assert shortened(preset("digits"), 1.0) == preset("digits")
    plan = planned("table1", factor=0.5)
    assert {t.run.target.epochs for t in plan.trainings.values()} == {45}


SIZES = (1294, 144, 359)


def pace(plan: Plan) -> dict[str, Calibration]:
    """A machine that does an operation a second, in all stages of all systems."""
    names = {stage for training in plan.trainings.values() for stage in training.stages}
    paces = {name: Pace(1.0, 1, 0) for name in names}
    return {training.preset: Calibration("here", paces) for training in plan.trainings.values()}


def test_a_shared_stage_costs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def work(run: RunConfig, stage: Stage, *_: Any) -> Work:
        asked.append(stage.name)
        return Work(stage.name, 60.0)

    def judging(run: RunConfig, pace: Any, train: int, test: int, bare: bool) -> float:
        if bare:
            return 10.0
        asked.append(run.defense + " judged")
        return 30.0

    monkeypatch.setattr("dircluster.reproduction.costs.stage_work", work)
    monkeypatch.setattr("dircluster.reproduction.costs.judging_seconds", judging)
    plan = planned("fig6b", only="hgd_a,dir", seeds=2)
    found = costs(plan, lambda run: SIZES, "local", pace(plan))
    assert [cost.shared for cost in found] == [(), (), ("target",), ("target",)]
    assert [cost.trained for cost in found[::2]] == [("target", "hgd", "hgd_a"), ("pretrain", "dir")]
    assert [cost.operations for cost in found] == [180.0, 180.0, 120.0, 120.0]
    assert [cost.seconds for cost in found] == [180.0, 180.0, 120.0, 120.0]
    assert [cost.judging for cost in found] == [30.0, 30.0, 20.0, 20.0]  # the target's rows are those of the first
    stages = ["dir", "hgd", "hgd_a", "pretrain", "target"]
    assert sorted(asked) == sorted([*stages, "dir judged", "hgd_a judged"])  # seeds cost the same
    asked.clear()
    trained = costs(plan, lambda run: SIZES, "local", pace(plan), judged_too=False)
    assert [cost.seconds for cost in trained] == [cost.seconds for cost in found]
    assert sorted(asked) == stages
    asked.clear()
    uncalibrated = costs(plan, lambda run: SIZES, "local")
    assert [(cost.operations, cost.seconds, cost.judging) for cost in uncalibrated[::2]] == [
        (180.0, 0.0, 0.0),
        (120.0, 0.0, 0.0),
    ]
    assert sorted(asked) == stages
    seeds = by_kind(found)
    assert [(cost.kind, cost.seeds, cost.operations, cost.judging) for cost in seeds] == [
        ("hgd_a", (0, 1), 360.0, 60.0),
        ("dir", (0, 1), 240.0, 40.0),
    ]


def test_a_system_that_cannot_be_timed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan in minutes needs it, such as one that this GPU has no memory for; a plan without shows it as unknown."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("planted\nand more of it")

    plan, line = planned("fig6b", family="digits_smoke", only="hgd_a"), r"^hgd_a, seed 0 cannot be foretold"
    line += r" \(RuntimeError: planted\): leave hgd_a out by --only$"
    monkeypatch.setattr("dircluster.reproduction.costs.calibrate", fail)
    with pytest.raises(ConfigError, match=line):
        calibrated(plan, ALONE, 1.0, "local")
    monkeypatch.setattr("dircluster.reproduction.costs.judging_seconds", fail)
    monkeypatch.setattr("dircluster.reproduction.costs.stage_work", lambda run, stage, *_: Work(stage.name, 60.0))
    with pytest.raises(ConfigError, match=line):
        costs(plan, lambda run: SIZES, "local", pace(plan))
    monkeypatch.setattr("dircluster.reproduction.costs.stage_work", fail)
    with pytest.raises(ConfigError, match=line):
        costs(plan, lambda run: SIZES, "local", pace(plan))
    assert math.isnan(costs(plan, lambda run: SIZES, "local")[0].operations)


def test_what_is_stored_costs_nothing() -> None:
    plan = planned("fig6b", family="digits_smoke", only="identity,dir", seeds=2)
    first = plan.trainings[plan.served["fig6b", "None"][0]]
    found = costs(plan, lambda run: (60, 20, 80), "local", stored={first.stages["target"]})
    assert [(cost.stored, cost.trained) for cost in found[:2]] == [(("target",), ()), ((), ("target",))]
    assert [(cost.stored, cost.shared) for cost in found[2:]] == [(("target",), ()), ((), ("target",))]
    assert found[0].operations == 0
    assert found[1].operations > 0
    assert found[2].operations == found[3].operations > 0
    assert [cost.seeds for cost in by_kind(found)] == [(0,), (1,), (0,), (1,)]


def test_a_transfer_costs_its_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    suites: list[str] = []

    def judging(run: RunConfig, pace: Any, train: int, test: int, bare: bool) -> float:
        suites.append(run.evaluation.suite)
        return 10.0 if bare else 30.0

    monkeypatch.setattr("dircluster.reproduction.costs.stage_work", lambda run, stage, *_: Work(stage.name, 60.0))
    monkeypatch.setattr("dircluster.reproduction.costs.judging_seconds", judging)
    plan = planned("table2", only="dir")
    found = costs(plan, lambda run: SIZES, "local", pace(plan))
    assert plan.transfers
    moved = [cost for cost in found if cost.kind in {transfer.kind for transfer in plan.transfers.values()}]
    assert [(cost.operations, cost.judging) for cost in moved] == [(0.0, 30.0)] * len(plan.transfers)
    assert {transfer.suite for transfer in plan.transfers.values()} <= set(suites)
    judged = next(iter(plan.transfers.values()))
    left = costs(plan, lambda run: SIZES, "local", pace(plan), over={judged.key})
    assert [cost.judging for cost in left if cost.kind == judged.kind] == [0.0]


@pytest.mark.parametrize(("minutes", "factor"), [(100.0, 1.0), (60.0, 1.0), (20.0, 0.33), (0.65, 0.01)])
def test_a_budget_gives_one_factor(minutes: float, factor: float) -> None:
    assert factor_for(minutes, [Cost(name, (0,), "quick", seconds=1800.0) for name in "ab"]) == factor


def test_a_budget_that_teaches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--budget 0\.5 is too little of the 60 minutes .* give at least 1, fewer"):
        factor_for(0.5, [Cost("a", (0,), "quick", seconds=3600.0)])
