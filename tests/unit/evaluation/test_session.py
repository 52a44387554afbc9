"""The judge: intervals, suites, shards, what the rows claim, what a module must be, and the report."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dircluster
from dircluster.attacks.expectation import straight_through
from dircluster.config import AttackConfig, ConfigError, EvaluationConfig, RunConfig, to_dict, with_values
from dircluster.data.sources import load
from dircluster.defenses.base import AdaptiveAttack, Defended
from dircluster.defenses.dir import DEFENSE
from dircluster.defenses.identity import Identity
from dircluster.defenses.table import find_defense
from dircluster.evaluation import gradient_masking
from dircluster.evaluation.attack_runner import AttackRunner
from dircluster.evaluation.attack_table import ATTACKS, Attack, AttackSetting
from dircluster.evaluation.evaluation import EvalShard, Evaluation, run
from dircluster.evaluation.html_report import _as_trained, robustbench_entry, without_draws, write_report
from dircluster.evaluation.meeting import meet
from dircluster.evaluation.model_card import markdown_table
from dircluster.evaluation.pictures import to_pixels
from dircluster.evaluation.provenance import facts_of, module_digest
from dircluster.evaluation.results import to_plain
from dircluster.evaluation.session import EvaluationReport, evaluate, evaluation_of, plan, stores_of
from dircluster.evaluation.statistics import wilson_interval
from dircluster.evaluation.store import FolderStore, MemoryStore
from dircluster.evaluation.suites import SUITES, AttackSpec, suite
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import frozen
from dircluster.presets import PRESETS, preset
from dircluster.training.stages import Networks
from dircluster.training.validation import restoration_grid
from tests.conftest import ALONE
from tests.unit.evaluation.conftest import EPSILON

FEW = EvaluationConfig(
    images=24, batch_size=8, steps=3, eot=2, draws=3, resubmissions=2, votes=3, queries=5, verdict_images=16
)


def test_wilson_interval() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="need 0 <= correct"):
        wilson_interval(1, 0)


@pytest.fixture(scope="module")
def defense(at_model: nn.Module) -> Defended:
    run = preset("digits_smoke")
    networks = {"denoiser": DEFENSE.build(run, "denoiser"), "classifier": at_model}
    return DEFENSE.defended(run, networks)


def judged(module: nn.Module, digits: tuple[Tensor, Tensor], name: str = "quick", **more: Any) -> EvaluationReport:
    return evaluate(module, *digits, name, epsilon=EPSILON, settings=FEW, name="dir", **more)


@pytest.fixture(scope="module")
def quick(defense: Defended, digits: tuple[Tensor, Tensor]) -> EvaluationReport:
    """The defense under the suite that is asked for by itself."""
    return judged(defense, digits)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (
            "quick",
            "none natural none, none pgd3 none, none malt none, dir natural fixed, dir pgd3 fixed,"
            " dir pgd3-margin fixed, dir natural fresh, dir pgd3 fresh, dir transfer-pgd3 fresh, dir malt fixed",
        ),
        (
            "paper",
            "none natural none, none pgd3 none, none malt none, dir natural fixed, dir pgd3 fixed,"
            " dir pgd3-margin fixed, dir autoattack-standard fixed, dir mifgsm3 fixed, dir vnifgsm3 fixed,"
            " dir masked3 fixed,"
            " dir restored3-from-natural fixed, dir restored3-from-adversarial fixed, dir natural fresh,"
            " dir pgd3 fresh, dir mifgsm3 fresh, dir masked3 fresh, dir bpda3-eot2 fresh,"
            " dir natural-mean-of-10 fresh, dir bpda3-mean-of-10 fresh, dir pgd3-wor2 fresh,"
            " dir pgd3-mv3 fresh, dir malt fixed",
        ),
        (
            "rigorous",
            "none natural none, none pgd3 none, none malt none, dir natural fixed, dir pgd3 fixed,"
            " dir autoattack-standard fixed, dir pma fixed, dir natural fresh, dir pgd3 fresh, dir pgd3-margin fresh,"
            " dir square fresh, dir l2-pgd3 fresh, dir autoattack-rand fresh, dir natural-mean-of-2 fresh,"
            " dir pgd3-mean-of-2 fresh, dir pgd3-wor2 fresh, dir pgd3-mv3 fresh, dir transfer-pgd3 fresh,"
            " dir malt fixed",
        ),
    ],
)
def test_a_suite_runs_whole_on_a_defense(
    defense: Defended, digits: tuple[Tensor, Tensor], name: str, rows: str
) -> None:
    found = judged(defense, digits, name)
    assert ", ".join(f"{r.defense} {r.attack} {r.randomness}" for r in found.rows) == rows
    for row in found.rows:
        assert row.total == 24
        assert row.always <= row.worst <= row.mean <= 1
        assert row.interval[0] <= row.accuracy <= row.interval[1]
        assert row.accuracy == row.correct / row.judged
        assert len(row.sha256) == 64


@pytest.mark.long
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_runs_on_a_plain_classifier(at_model: nn.Module, digits: tuple[Tensor, Tensor], name: str) -> None:
    found = judged(at_model, (digits[0][:6], digits[1][:6]), name)
    assert {row.randomness for row in found.rows} == {"none"}
    assert {row.draws for row in found.rows} == {1}
    assert [(row.attack, mark) for row in found.rows for mark in row.marks] == []
    assert "natural" in {row.attack for row in found.rows}


def test_a_fixed_defense_is_judged_on_the_draws_that_the_attacker_knew(
    quick: EvaluationReport, defense: Defended, digits: tuple[Tensor, Tensor]
) -> None:
    rows = {(r.attack, r.randomness): r for r in quick.rows if r.defense == "dir"}
    fixed, fresh = rows["pgd3", "fixed"], rows["pgd3", "fresh"]
    assert (fixed.judged, fixed.draws, fresh.judged, fresh.draws) == (24, 3, 72, 3)
    assert (fresh.steps, fresh.eot, fresh.epsilon) == (3, 2, EPSILON)
    victim = VictimModel(defense, "dir")
    images = digits[0][:6]
    known, anew = victim.model("fixed", 5), victim.model("fresh", 5)
    assert torch.equal(known(images), known(images))
    assert torch.allclose(known(images)[2:4], known(images[2:4]), atol=1e-5)  # AutoAttack passes some images alone
    assert not torch.equal(anew(images), anew(images))
    assert torch.equal(victim.model("fresh", 5)(images), victim.model("fresh", 5)(images))
    each = victim.model("fixed", 5, images=6)  # every image its own
    assert torch.equal(each(images), each(images))
    assert not torch.allclose(each(images[:1].expand(6, -1, -1, -1)), known(images[:1]), atol=1e-5)


def test_known_draws_are_those_that_images_are_judged_under_and_each_shards_own(
    defense: Defended, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Tensor] = []
    seeds: list[tuple[int, int]] = []

    def looks(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        met.append(setting.model(len(images))(images).argmax(dim=1))
        seeds.append((setting.seed, setting.defense_seed))
        return images, []

    monkeypatch.setitem(ATTACKS, "looks", Attack(looks))
    spec, images = AttackSpec("looks", "fixed", epsilon=EPSILON), digits[0][:96]
    evaluation = Evaluation([spec], 96, 0, 32, 64, MemoryStore(), VictimModel(defense, "dir"))
    run(evaluation, lambda a, b: (images[a:b], digits[1][a:b]))
    judged_as = evaluation.predicted(spec)
    assert torch.equal(judged_as["fixed"][:, 0], torch.cat(met))
    assert not torch.equal(judged_as["fresh"][:, 0], torch.cat(met))
    assert [len(set(each)) for each in zip(*seeds, strict=True)] == [3, 3]  # starts and draws of one shard are not all


def test_averaged_logits_and_their_gradients_do_not_depend_on_the_bound_of_rows(
    defense: Defended, digits: tuple[Tensor, Tensor]
) -> None:
    victim, images, found = VictimModel(defense, "dir"), digits[0][:4], []
    for most in (None, 8, 4):
        asked = images.clone().requires_grad_(True)
        logits = victim.model("fresh", 3, draws=5, most_rows=most)(asked)
        (gradient,) = torch.autograd.grad(logits.square().sum(), asked)
        found.append((logits.detach(), gradient))
    for logits, gradient in found[1:]:
        torch.testing.assert_close(logits, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-4)


def test_modes_that_would_be_ignored_are_refused(defense: Defended, digits: tuple[Tensor, Tensor]) -> None:
    for made in (defense.fixed(3), defense.fresh(draws=4)):
        with pytest.raises(ConfigError, match="give it with fresh draws"):
            judged(made, digits)


def test_a_module_comes_back_in_the_mode_it_came_in(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    module = nn.Sequential(at_model, nn.Dropout(0.1)).train()
    at_model.eval()
    surrogate = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10)).train()
    surrogate[0].eval()
    reference = judged(nn.Sequential(at_model, nn.Dropout(0.1)).eval(), digits, surrogate=surrogate.eval()).rows
    surrogate.train()
    surrogate[0].eval()

    def modes() -> list[bool]:
        return [part.training for part in (module, at_model, module[1], *surrogate)]

    came = [True, False, True, False, True, True]
    assert judged(module, digits, surrogate=surrogate).rows == reference
    assert modes() == came

    def stop(*_: Any) -> None:
        raise Stopped

    victim = VictimModel(module, "m", surrogate)
    assert modes() == came
    meet(victim, digits[0][:4], 9)
    assert modes() == came
    for failing in (
        lambda: judged(module, digits, on_shard=stop),
        lambda: judged(nn.Sequential(module, nn.Softmax(1)), digits),
    ):
        with pytest.raises((Stopped, ConfigError)):
            failing()
        assert modes() == came


def test_what_other_code_found_is_found_again(
    at_model: nn.Module, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, seen = MemoryStore(), []
    judged(at_model, digits, store=store)
    judged(at_model, digits, store=store, on_shard=lambda shard, done, total: seen.append(shard))
    assert seen == []
    monkeypatch.setattr("dircluster.evaluation.evaluation.code", lambda spec, victim: "other")
    judged(at_model, digits, store=store, on_shard=lambda shard, done, total: seen.append(shard))
    assert len(seen) == 12


class Scaled(nn.Module):
    """A classifier of brighter images, by a number that is no weight."""

    def __init__(self, inner: nn.Module, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.inner(self.scale * images)
        return made


def test_a_store_keeps_what_is_of_other_modules_images_or_seeds_apart(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    store, seen = MemoryStore(), list[str]()

    def begun(module: Any, images: Tensor, labels: Tensor, **more: Any) -> int:
        seen.clear()
        few = EvaluationConfig(batch_size=16, steps=1)
        evaluate(module, images, labels, settings=few, store=store, on_shard=lambda *_: seen.append(""), **more)
        return len(seen)

    one, other, surrogate = (nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 10)) for _ in range(3))
    first = images[:16], labels[:16]
    assert begun(one, *first) > 0
    assert begun(one, *first) == 0
    for changed in (
        lambda: begun(other, *first),
        lambda: begun(Scaled(one, 0.5), *first),
        lambda: begun(Scaled(one, 0.25), *first),
        lambda: begun(one, images[16:32], labels[16:32]),
        lambda: begun(one, first[0], labels[16:32]),
        lambda: begun(one, *first, seed=1),
        lambda: begun(one, *first, surrogate=surrogate),
        lambda: begun(lambda x: one(x), *first),
        lambda: begun(lambda x: one(1 - x), *first),
        lambda: begun(lambda x: 1000 * one(x), *first),
        lambda: begun(lambda x: one(straight_through(2 * x, x)), *first),  # the same answers by another gradient
        lambda: begun(lambda x: one(x), *first, surrogate=lambda x: surrogate(1 - x)),
    ):
        assert changed() > 0
        assert changed() == 0
    assert begun(one, *first) == 0


class Masked(nn.Module):
    """Somebody's randomized module: drops pixels by PyTorch's own stream."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.inner(nn.functional.dropout(images, 0.3))
        return made


def test_what_the_global_seed_seeds_is_randomness(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    def noisy(images: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
        made: Tensor = at_model(images + 0.3 * torch.randn(images[:1].shape, generator=generator))
        return made

    victim = VictimModel(noisy, "m")
    meet(victim, digits[0][:4], 9)
    assert victim.randomized


def test_somebodys_randomness_is_found_seeded_and_left_alone(
    at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    module, state = Masked(at_model), torch.get_rng_state()
    victim = VictimModel(module, "m")
    meet(victim, digits[0][:4], 9)
    assert victim.randomized
    assert torch.equal(victim.model("fixed", 1)(digits[0]), victim.model("fixed", 1)(digits[0]))
    found = judged(module, digits)
    torch.rand(3)
    assert found.rows == judged(module, digits).rows
    torch.set_rng_state(state)
    judged(module, digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert {row.randomness for row in found.rows} == {"fixed", "fresh"}


class Stopped(Exception):
    pass


def test_what_is_finished_is_not_done_again_and_the_order_does_not_matter(
    quick: EvaluationReport, defense: Defended, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    seen: list[str] = []

    def stop(shard: EvalShard, done: int, total: int) -> None:
        seen.append(shard.name)
        if done == 9:
            raise Stopped

    store = FolderStore(tmp_path, keep_images=True)
    with pytest.raises(Stopped):
        judged(defense, digits, store=store, on_shard=stop)
    (damaged,) = list(tmp_path.glob(f"*/{seen[0]}.json"))
    damaged.write_text("{")
    (emptied,) = list(tmp_path.glob(f"*/{seen[1]}.safetensors"))
    emptied.write_bytes(b"")
    done_before = set(seen[2:9])
    seen.clear()
    again = judged(defense, digits, store=store, on_shard=lambda shard, done, total: seen.append(shard.name))
    assert again.rows == quick.rows
    assert not done_before & set(seen)
    assert len(seen) == 36 - 7
    assert len(list(tmp_path.glob("*/*/*.safetensors"))) == 36
    assert all(not name.startswith("/") for name in seen)


def begun(defense: Defended, digits: tuple[Tensor, Tensor], storage: Path) -> Evaluation:
    """Suite quick of ``defense``, kept in ``storage`` as jobs keep it."""
    victim, images = VictimModel(defense, "dir"), digits[0]
    meet(victim, images[:8], 9)
    facts = facts_of(module_digest(defense), "digits", len(images), 0, FEW)
    planned = plan(victim, AttackConfig(epsilon=EPSILON), FEW)
    return evaluation_of(planned, victim, len(images), 0, FEW, *stores_of(victim, facts, storage))


def test_the_bare_target_is_judged_once_for_all_that_stand_before_it(
    defense: Defended, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    some = digits[0][:16], digits[1][:16]
    first = begun(defense, some, tmp_path)
    run(first, lambda a, b: (some[0][a:b], some[1][a:b]))
    trained = copy.deepcopy(defense)
    next(trained.purifier.parameters()).data += 0.01
    second = begun(trained, some, tmp_path)
    assert {shard.spec for shard in second.open_shards()} == {spec for spec in second.specs if not spec.bare}
    bare = [spec for spec in second.specs if spec.bare]
    assert [second.result(spec, "dir") for spec in bare] == [first.result(spec, "dir") for spec in bare] != []
    other = copy.deepcopy(defense)
    next(other.classifier.parameters()).data += 0.01
    assert {shard.spec for shard in begun(other, some, tmp_path).open_shards()} == set(second.specs)


class Drawing(nn.Module):
    """A classifier behind noise of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images + 0.15 * torch.randn_like(images))
        return logits


def test_a_classifier_that_draws_has_no_rows_of_its_own(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """No row of it alone would know its draws: one lucky pass would count, and hang on the caller's stream."""
    some = digits[0][:24], digits[1][:24]
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(judged(Defended(Identity(), Drawing(at_model)), some))
    assert [row.accuracy for row in found[0].rows] == [row.accuracy for row in found[1].rows]
    assert {row.defense for row in found[0].rows} == {"dir"}
    assert not any(row.attack.startswith("transfer") for row in found[0].rows)
    assert "the classifier draws at random: it is judged behind the purifier alone" in found[0].notes
    around = Identity()
    around.adaptive = (AdaptiveAttack("around", "identity", 2),)  # its attack needs no classifier by itself
    rows = judged(Defended(around, Drawing(at_model)), some, "paper").rows
    assert any(row.attack.startswith("around") for row in rows)


class Collapsed(nn.Module):
    """A purifier that leaves next to nothing of an image, before a sound classifier."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def restore(self, images: Tensor) -> Tensor:
        return 1e-3 * images

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.restore(images))
        return logits


def test_what_gives_all_images_one_class_is_marked_in_each_of_its_rows(
    at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    some = digits[0][:24], digits[1][:24]
    rows = judged(Collapsed(at_model), some).rows
    assert {(row.defense, "constant" in {mark.kind for mark in row.marks}) for row in rows} == {
        ("none", False),
        ("dir", True),
    }
    (natural,) = (row for row in rows if (row.defense, row.attack) == ("dir", "natural"))
    assert [str(mark) for mark in natural.marks] == ["one class for all natural images: 100.0 %"]
    alike = some[1] == some[1].mode().values  # of one class alone, whose answers are right
    sound = judged(at_model, (some[0][alike], some[1][alike])).rows
    assert [row.marks for row in sound if row.attack == "natural" and row.accuracy == 1] == [()]


def test_results_survive_json(quick: EvaluationReport) -> None:
    rows = to_plain(quick.rows)
    assert json.loads(json.dumps(quick.to_plain())) == quick.to_plain()
    assert markdown_table(rows).count("\n") == 13
    assert markdown_table(rows).startswith("Accuracy, first ")
    assert "EOT 2" in str(quick)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(4, 8, 8)}, r"images must be \(N, C, H, W\), got shape"),
        ({"images": torch.rand(4, 1, 8, 8) * 255}, r"images must lie in \[0, 1\]"),
        ({"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, "images must be floats"),
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()}, "there are no images"),
        ({"images": torch.rand(4, 3, 8, 8)}, "the defense cannot take images of shape"),
        ({"labels": torch.tensor([0, 1, 2, 10])}, "labels reach 10, but the defense gives 10 classes"),
        ({"labels": torch.tensor([0, 1, 2, -1])}, "labels must be 0 or more"),
        ({"labels": torch.rand(4)}, "labels must be 4 whole numbers"),
        ({"suite": "hard"}, "there is no suite 'hard'; choose quick, autoattack, paper, rigorous"),
        ({"after": nn.Softmax(dim=1)}, "returns probabilities"),
        ({"after": nn.Threshold(1e9, torch.nan)}, "not finite"),
        ({"after": nn.Flatten(0)}, "must return logits"),
    ],
)
def test_bad_input_is_one_line(at_model: nn.Module, change: dict[str, Any], message: str) -> None:
    module = nn.Sequential(at_model, change.get("after", nn.Identity()))
    images, labels = change.get("images", torch.rand(4, 1, 8, 8)), change.get("labels", torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ConfigError, match=message) as caught:
        dircluster.evaluate(module, images, labels, suite=change.get("suite", "quick"))
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_pgd_is_not_half_a_point_weaker_than_apgd(at_model: nn.Module) -> None:
    """PGD-40 from four starts against APGD-CE (pyautoattack, 100 steps) on an adversarially trained model."""
    from pyautoattack import AutoAttack

    test = load(preset("digits").data, 0).test
    images, labels = test.pixels(), test.labels
    apgd = AutoAttack(at_model, eps=EPSILON, seed=0, version="custom", attacks=["apgd-ce"])
    apgd.apgd.n_restarts = 1
    with torch.random.fork_rng():
        theirs, _ = apgd.run_standard_evaluation(images, labels, batch_size=len(images))
    spec = AttackSpec("pgd", epsilon=EPSILON, step_size=EPSILON / 4, steps=40, restarts=4)
    victim = VictimModel(at_model, "at")
    with frozen(at_model):
        ours, _ = AttackRunner(victim, spec, 0, 0, 1024)(images, labels)
    left = [(at_model(x).argmax(1) == labels).double().mean().item() for x in (ours, theirs)]
    assert left[0] - left[1] <= 0.005, left


def test_the_verdict_from_known_accuracies() -> None:
    specs = gradient_masking.check_specs(AttackConfig(epsilon=0.1), EvaluationConfig(), randomized=True, transfers=True)
    fine = dict.fromkeys(specs, 0.5) | {"natural": 0.9, "random noise": 0.9, "epsilon 1": 0.0, "gradients": 1.0}
    fine |= dict.fromkeys([*gradient_masking.ALIKE, "slope"], 1.0)
    fine |= {"epsilon 0.025": 0.8, "epsilon 0.05": 0.7, "epsilon 0.2": 0.3, "epsilon 0.4": 0.1}

    def flagged(**changed: float) -> set[str]:
        values = fine | {name.replace("_", " "): value for name, value in changed.items()}

        def shares(spec: AttackSpec) -> Tensor:
            names = [name for name, known in specs.items() if known == spec]
            made = torch.zeros(100)
            made[: round(100 * values[names[-1]])] = 1
            return made.double()

        return {check.question.split("?")[0] for check in gradient_masking.checks(specs, shares) if not check.passed}

    assert flagged() == set()
    assert flagged(margin_loss=0.3) == {
        "Is cross-entropy no weaker than a loss that the scale of the logits leaves alone"
    }
    assert flagged(slope=0.5) == {"Does the loss move as its gradient says"}
    assert flagged(company=0.99) == {"Are an image's logits the same whatever images pass beside it"}
    assert flagged(epsilon_1=0.05) == {"Does a radius of 1 leave nothing"}
    assert flagged(random_noise=0.7) == {"Is random noise of the same size harmless"}
    assert flagged(draws_known=0.2) == {"Does robustness outlive its randomness"}
    assert flagged(transfer=0.3) == {"Is the white box no weaker than a transfer from another model"}
    assert flagged(square=0.3) == {"Is the white box no weaker than Square, which sees no gradient"}
    assert flagged(one_step=0.3) == {"Is many steps no weaker than one"}
    assert flagged(gradients=0.9) == {"Do all images have a gradient"}
    assert flagged(**{"80 steps": 0.3}) == {"Has the attack converged in steps"}
    assert flagged(**{"4 restarts": 0.3}) == {"Has the attack converged in restarts"}
    assert flagged(**{"EOT 32": 0.3}) == {"Has the attack converged in EOT draws"}
    assert "Does accuracy fall as the radius grows" in flagged(**{"epsilon 0.2": 0.8})


def test_lucky_draws_leave_nothing() -> None:
    specs = gradient_masking.check_specs(
        AttackConfig(epsilon=0.1), EvaluationConfig(), randomized=True, transfers=False
    )

    def left(share: float, images: int) -> bool:
        """Whether ``images`` of 100 that are right in ``share`` of their draws count as nothing."""

        def shares(spec: AttackSpec) -> Tensor:
            lasting = spec == specs["epsilon 1"]
            return torch.where(torch.arange(100) < images, share if lasting else 1.0, 0.0 if lasting else 1.0).double()

        (row,) = [c for c in gradient_masking.checks(specs, shares) if c.question.startswith("Does a radius of 1")]
        return row.passed is True

    assert left(0.1, 40)
    assert left(0.03, 100)
    assert not left(0.6, 2)
    assert not left(0.4, 100)


@pytest.mark.long
def test_the_report_stands_alone(
    defense: Defended, at_model: nn.Module, digits: tuple[Tensor, Tensor], smoke: RunConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(smoke, evaluation=FEW)
    found = judged(defense, digits, "paper", verdict=True)
    test, said = load(config.data, 0).test, []
    facts = {"data": "0" * 64, "defense": "models:/<script><b>bold", "commit": "abc"}
    page, data = write_report(
        found, VictimModel(defense, "dir"), test, config, facts, tmp_path / "out", at_model, said.append
    )
    html, plain = page.read_text(), json.loads(data.read_text())
    assert "<script>" not in html
    assert "<b>bold" not in html
    assert "://" not in re.sub(r"base64,[^\"]+", "", html)  # nothing is fetched
    assert "default-src 'none'" in html  # and nothing could be
    assert html.count("data:image/png;base64,") >= 3
    assert set(plain["figures"]["discarded_noise"]) == {
        "shares",
        *(f"{target}, {kind}" for target in ("target", "natural target") for kind in ("PGD", "MI-FGSM")),
    }
    assert plain["robustbench"]["clean_acc"] == f"{100 * found.rows[3].accuracy:.2f}"
    assert plain["robustbench"]["autoattack_acc"] is not None
    assert len(plain["verdict"]) == 18
    assert said == [] or "umap-learn is not installed" in said[0]
    shares = plain["figures"]["discarded_noise"]["target, PGD"]
    assert shares[-1] >= shares[0]  # all noise gone
    assert robustbench_entry(found, config)["eps"] == f"{255 * config.attack.epsilon:.4g}/255"


def test_published_numbers_stand_beside_their_rows(defense: Defended, monkeypatch: pytest.MonkeyPatch) -> None:
    other = with_values(preset("cifar10"), {"masking.ratio": 0.3})
    assert other.printed == {}
    assert preset("cifar10").printed["dir"]["pgd20"] == 54.27
    assert preset("cifar10").printed["dir"]["bpda40"] == 52.09
    assert preset("svhn").printed["none"]["autoattack-standard"] == 45.16
    assert preset("digits").printed == {}
    assert "square" not in preset("cifar10").printed["dir"]
    bare = preset("cifar10_identity")
    none = find_defense("identity").defended(bare, Networks(bare, ALONE))
    assert _as_trained(bare, VictimModel(none, "identity"))  # no section decides the network of its purifier
    for module in (Defended(defense.purifier, defense.classifier), nn.Flatten()):
        assert not _as_trained(preset("cifar10"), VictimModel(module, "dir"))  # whose settings nobody knows
    monkeypatch.setattr(defense, "settings", to_dict(preset("cifar10")))
    assert _as_trained(preset("cifar10"), VictimModel(defense, "dir"))
    assert not _as_trained(other, VictimModel(defense, "dir"))


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).printed and "smoke" not in name])
def test_every_published_number_is_of_a_row_that_there_is(name: str) -> None:
    run = preset(name)
    kind = {"randomized": run.defense in ("dir", "menet", "ebm"), "masked": run.defense == "dir"}
    planned = suite("paper", run.attack, run.evaluation, purifies=True, transfers=True, **kind)
    assert {attack for row in run.printed.values() for attack in row} <= {without_draws(spec.name) for spec in planned}


def test_a_suite_without_randomness_has_no_draws() -> None:
    for name in SUITES:
        specs = suite(
            name, AttackConfig(), EvaluationConfig(), randomized=False, purifies=True, transfers=True, masked=False
        )
        assert {(spec.randomness, spec.draws, spec.eot, spec.average) for spec in specs} == {("none", 1, 1, 1)}
    assert MemoryStore().get("nothing") is None


def test_pictures(smoke: RunConfig) -> None:
    networks = {name: DEFENSE.build(smoke, name) for name in ("denoiser", "classifier")}
    grid = restoration_grid(
        DEFENSE.defended(smoke, networks), load(smoke.data, 0).held_out, smoke, torch.device("cpu"), images=4
    )
    assert grid.shape == (5, 4, 1, 8, 8)
    assert (grid[1] - grid[0]).abs().max() <= 0.15 + 1e-6
    masked = grid[2] == 0
    assert masked.float().mean() >= 0.5  # half of the patches, and black pixels
    pixels = to_pixels(grid)
    assert pixels.shape == (5 * 66, 4 * 66, 3)
    assert pixels.dtype.name == "uint8"


def test_a_transfer_is_crafted_on_the_surrogate(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rows = [{r.attack: r for r in judged(at_model, digits, surrogate=s).rows} for s in (at_model, other, None)]
    assert rows[0]["transfer-pgd3"].sha256 == rows[0]["pgd3"].sha256
    assert rows[1]["transfer-pgd3"].sha256 != rows[0]["pgd3"].sha256
    assert rows[1]["pgd3"] == rows[0]["pgd3"]
    assert set(rows[2]) == {"natural", "pgd3", "pgd3-margin", "malt"}
