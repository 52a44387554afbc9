"""The table of attacks: names, what a row says, and an attack of one's own met through dircluster.evaluate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dircluster
from dircluster.attacks.gradient import margin_loss
from dircluster.config import AttackConfig, ConfigError, EvaluationConfig
from dircluster.defenses.table import find_defense
from dircluster.evaluation.attack_table import ATTACKS, Attack, AttackSetting, AttackSpec, attack_of
from dircluster.evaluation.gradient_masking import check_specs
from dircluster.evaluation.suites import SUITES, how, suite
from dircluster.evaluation.victim import VictimModel
from dircluster.presets import preset
from dircluster.training.stages import Networks
from tests.conftest import ALONE

FEW = EvaluationConfig(images=12, batch_size=8, steps=2)


def toy(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    """The brightest image of the ball."""
    return (images + setting.spec.epsilon).clamp(0, 1), ["bright"] if setting.spec.steps > 2 else []


@pytest.fixture
def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_names_of_the_table() -> None:
    assert AttackSpec("pgd", steps=20).name == "pgd20"
    assert AttackSpec("pgd", on="target", steps=20).name == "transfer-pgd20"
    assert AttackSpec("pgd", on="target", judged="target", steps=20).name == "pgd20"
    assert AttackSpec("square", steps=5000).name == "square"
    assert attack_of("transfer-pgd20") is ATTACKS["pgd"]
    assert attack_of("autoattack-rand") is ATTACKS["autoattack"]
    assert attack_of("l2-pgd20") is None
    with pytest.raises(ConfigError, match="there is no attack 'x'; there are natural"):
        _ = AttackSpec("x").name


def test_a_row_says_what_its_steps_count() -> None:
    row = {"epsilon": 0.1, "norm": "linf", "restarts": 1, "eot": 1, "average": 1, "draws": 1, "randomness": "none"}
    assert how(row | {"attack": "square", "steps": 9, "step_size": 0.0}) == "eps 0.1, 9 queries of Square"
    restored = how(row | {"attack": "restored9-from-natural", "steps": 9, "step_size": 0.02})
    assert restored == "eps 0.1, 9 steps of 0.02; around the restored image, another threat"
    assert how(row | {"attack": "l2-pgd9", "steps": 9, "step_size": 0.02}) == "eps 0.1, 9 steps of 0.02"


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_leaves_out_what_a_module_lacks(name: str) -> None:
    found = suite(
        name, AttackConfig(), EvaluationConfig(), randomized=False, purifies=False, transfers=False, masked=False
    )
    assert not [spec for spec in found if ATTACKS[spec.attack].needs]


def test_an_attack_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, digits: tuple[Tensor, Tensor], plain: nn.Module
) -> None:
    monkeypatch.setitem(ATTACKS, "toy", Attack(toy, counts="looks", labeled=True))
    spec = AttackSpec("toy", epsilon=0.2, steps=3)
    found = dircluster.evaluate(plain, *digits, settings=FEW, attacks=[spec])
    row = found.rows[-1]
    images, labels = digits[0][:12], digits[1][:12]
    right = plain((images + 0.2).clamp(0, 1)).argmax(dim=1) == labels
    assert (row.attack, row.correct, row.total, row.step_size) == ("toy3", int(right.sum()), 12, 0.0)
    assert row.warnings == ("bright",)
    assert "3 looks" in str(found)
    assert found.rows[:-1] == dircluster.evaluate(plain, *digits, settings=FEW).rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norm": "l3"}, "norm must be linf or l2, got 'l3'"),
        ({"loss": "dlr"}, "loss must be ce or margin, got 'dlr'"),
        ({"judged": "both"}, "judged must be defense or target"),
        ({"epsilon": -0.1}, r"epsilon must be 0 or more, got -0\.1"),
        ({"epsilon": float("nan")}, "epsilon must be 0 or more, got nan"),
        ({"draws": 0}, "draws must be 1 or more, got 0"),
        ({"first": 0}, "first must be 1 or more, got 0"),
        ({"average": 2, "randomness": "fixed"}, "average and protocol are for randomness fresh, not fixed"),
        ({"protocol": "wor"}, "average and protocol are for randomness fresh, not none"),
    ],
)
def test_what_no_attack_can_have_is_refused_when_its_spec_is_made(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackSpec("pgd", **given)


@pytest.mark.parametrize("name", SUITES)
def test_no_suite_gives_an_attack_what_it_does_not_read(name: Any) -> None:
    for randomized in (False, True):
        kind = {"randomized": randomized, "purifies": True, "transfers": True, "masked": randomized}
        planned = suite(name, AttackConfig(), EvaluationConfig(restarts=3), **kind)
        verdict = check_specs(AttackConfig(), EvaluationConfig(), randomized=randomized, transfers=True)
        for spec in (*planned, *verdict.values()):
            usual = AttackSpec(spec.attack)
            assert all(getattr(spec, field) == getattr(usual, field) for field in ATTACKS[spec.attack].unread)


def test_the_attack_of_eq_8_climbs_the_loss_of_its_spec() -> None:
    run, images = preset("digits_smoke"), torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    victim = VictimModel(find_defense(run.defense).defended(run, Networks(run, ALONE)), "dir")
    labels, found = torch.arange(4), []
    for loss in ("ce", "margin"):
        spec = AttackSpec("masked", "fixed", epsilon=0.3, steps=3, step_size=0.1, loss=loss)
        found.append(ATTACKS["masked"].run(AttackSetting(victim, spec, 0, 0, 256), images, labels)[0])
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AttackSpec("nope"), "there is no attack 'nope'"),
        (AttackSpec("masked"), "attack masked needs masks, which defense does not have"),
        (AttackSpec("bpda"), "attack bpda needs purifier"),
        (AttackSpec("pgd", on="target", steps=2), "attack transfer-pgd2 needs a target"),
        (AttackSpec("pgd", randomness="fresh", steps=2), "randomness fresh, but defense needs none"),
        (AttackSpec("malt", steps=2, restarts=2), "attack malt does not read restarts: leave it 1, got 2"),
        (AttackSpec("square", steps=2, loss="margin"), "attack square does not read loss: leave it ce, got margin"),
        (AttackSpec("vnifgsm", steps=2, restarts=2), "attack vnifgsm2 starts at the image: leave restarts 1, got 2"),
        (AttackSpec("square", "fixed", steps=2), "attack square has randomness fixed, but defense needs none"),
        (AttackSpec("fgsm", epsilon=0.2, steps=20, step_size=0.2), "attack fgsm makes one step, of epsilon"),
        (AttackSpec("fgsm", epsilon=0.2, steps=1, step_size=0.1), "attack fgsm makes one step, of epsilon"),
    ],
)
def test_an_attack_that_a_module_cannot_meet(
    spec: AttackSpec, message: str, digits: tuple[Tensor, Tensor], plain: nn.Module
) -> None:
    with pytest.raises(ConfigError, match=message):
        dircluster.evaluate(plain, *digits, settings=FEW, attacks=[spec])


def test_restarts_start_anew_and_the_strongest_of_them_counts(
    digits: tuple[Tensor, Tensor], plain: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []
    monkeypatch.setattr(
        "dircluster.evaluation.attack_table.projected_ascent", lambda both, start, *_: starts.append(start) or start
    )
    spec, (images, labels) = AttackSpec("pgd", epsilon=0.2, steps=1, restarts=4), (part[:32] for part in digits)
    found, _ = ATTACKS["pgd"].run(AttackSetting(VictimModel(plain, "plain"), spec, 0, 0, 256), images, labels)
    assert len({start.numpy().tobytes() for start in starts}) == 4
    best = torch.stack([margin_loss(plain(start), labels) for start in starts]).argmax(dim=0)
    assert len(best.unique()) > 1
    assert torch.equal(found, torch.stack(starts)[best, torch.arange(32)])


@pytest.fixture
def masked() -> VictimModel:
    """An untrained DIR."""
    run = preset("digits_smoke")
    return VictimModel(find_defense(run.defense).defended(run, Networks(run, ALONE)), "dir")


@pytest.mark.parametrize("source", ["natural", "adversarial"])
def test_the_attack_of_eq_9_starts_at_what_is_restored_of_its_source(
    source: Any, masked: VictimModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, begun = "dircluster.evaluation.attack_table", list[Tensor]()
    monkeypatch.setattr(f"{room}.restored_attack", lambda model, restored, *_: begun.append(restored) or restored)
    monkeypatch.setattr(f"{room}.projected_ascent", lambda both, start, center, *_: 1 - center)
    images, spec = torch.rand(4, 1, 8, 8), AttackSpec("restored", "fixed", epsilon=0.3, steps=3, source=source)
    ATTACKS["restored"].run(AttackSetting(masked, spec, 0, 7, 256), images, torch.arange(4))
    with torch.no_grad():
        expected = masked.restorer("fixed", 7, 4)(images if source == "natural" else 1 - images)
    assert torch.equal(begun[0], expected)


def test_the_attacker_of_eq_8_knows_the_masks_of_the_fixed_form_or_draws_new_ones(masked: VictimModel) -> None:
    images = torch.rand(3, 1, 8, 8)
    known, fresh = masked.masks("fixed", 7, 3), masked.masks("fresh", 7, 3)
    assert torch.equal(known(), known())
    assert not torch.equal(fresh(), fresh())
    with torch.no_grad():
        answered = masked.model("fixed", 7, images=3)(images)
        torch.testing.assert_close(masked.logits_under(images, known()), answered)
