"""Protocols of randomized defenses, and the controls that tell weakness from luck."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster.config import AttackConfig, ConfigError, EvaluationConfig
from dircluster.evaluation import gradient_masking
from dircluster.evaluation.attack_runner import judge
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.results import Result, to_plain
from dircluster.evaluation.session import EvaluationReport, evaluate
from dircluster.evaluation.suites import SUITES, how, suite
from dircluster.evaluation.victim import VictimModel
from tests.unit.evaluation.conftest import EPSILON

SETTINGS = EvaluationConfig(steps=3, eot=2, draws=4, resubmissions=2, votes=5, batch_size=128)


class Errs(nn.Module):
    """An honest classifier that answers one row in ten at random."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        wild = torch.rand(len(images), 1) < 0.1
        return torch.where(wild, 20 * torch.randn_like(logits), logits)


@pytest.fixture(scope="module")
def rows(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> dict[str, Result]:
    step = AttackConfig(epsilon=EPSILON).step_for(3)
    mv = AttackSpec("pgd", "fresh", epsilon=EPSILON, step_size=step, steps=3, draws=4, average=5)
    mv = replace(mv, protocol="mv", label="mv")
    wor = replace(mv, protocol="wor", eot=2, draws=2, average=1, label="pgd3-wor2")
    attacks = [wor, mv, wor.unattacked("natural")]
    return by_name(evaluate(Errs(at_model), *digits, epsilon=EPSILON, settings=SETTINGS, attacks=attacks))


def by_name(found: EvaluationReport) -> dict[str, Result]:
    return {f"{row.protocol} {row.attack}": row for row in found.rows}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AttackSpec("square", "fixed", epsilon=EPSILON, steps=2), "attack square passes some images alone, which then"),
        (AttackSpec("autoattack", "fixed", epsilon=EPSILON, steps=2), "attack autoattack passes some images alone"),
        (AttackSpec("pgd", "fixed", epsilon=EPSILON, steps=2, eot=2), "pgd2 knows the draw: eot must be 1, got 2"),
        (
            AttackSpec("vnifgsm", "fresh", epsilon=EPSILON, steps=2, protocol="wor"),
            "attack vnifgsm2 looks outside the ball, and protocol wor counts every pass",
        ),
    ],
)
def test_a_row_that_would_be_judged_by_other_draws_or_images_than_its_own_is_refused(
    spec: AttackSpec, message: str, at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(Errs(at_model), *digits, epsilon=EPSILON, settings=replace(SETTINGS, images=8), attacks=[spec])


def test_restarts_of_an_attack_without_a_random_start_meet_other_draws(
    at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    spec = AttackSpec("fgsm", "fresh", epsilon=EPSILON, steps=1, step_size=EPSILON, draws=4)
    attacks = [replace(spec, restarts=count, label=f"fgsm-{count}") for count in (1, 3)]

    class Drops(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            made: Tensor = at_model(nn.functional.dropout(images, 0.5))
            return made

    found = evaluate(Drops(), *digits, epsilon=EPSILON, settings=replace(SETTINGS, images=16), attacks=attacks).rows
    one, three = (row for row in found if row.attack.startswith("fgsm"))
    assert one.sha256 != three.sha256


class Shifts(nn.Module):
    """A module that draws once for a whole pass: where copies of an image pass together, one draw is all of them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.sizes: set[int] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.add(len(images))
        logits: Tensor = self.inner(images)
        return logits.roll(int(torch.randint(2, ())), dims=1)


def test_draws_of_a_module_that_draws_once_a_pass_are_passes_of_their_own(
    at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    module, step = Shifts(at_model), AttackConfig(epsilon=EPSILON).step_for(2)
    plain = AttackSpec("pgd", "fresh", epsilon=EPSILON, step_size=step, steps=2, eot=3, draws=12, label="own")
    several = [
        plain,
        replace(plain, average=4, eot=1, label="mean"),
        replace(plain, protocol="mv", average=5, eot=1, label="mv"),
        replace(plain, protocol="wor", label="wor"),
    ]
    settings = EvaluationConfig(images=16, batch_size=16, steps=2, eot=2, draws=12)

    def begin(shard: Any, done: int, total: int) -> None:
        if done == 0:  # what is tried out before passes images otherwise
            module.sizes.clear()

    found = evaluate(module, *digits, epsilon=EPSILON, settings=settings, attacks=several, on_shard=begin).rows
    assert max(module.sizes) == 16
    drawn = next(row for row in found if row.attack == "own")
    assert drawn.always == 0 < drawn.accuracy  # every image is shifted in some of its draws, and in some not


@pytest.mark.parametrize("attack", ["malt", "square"])
def test_an_attack_that_hides_what_its_draws_break_has_no_worst_of_them(
    attack: str, at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    spec = AttackSpec(attack, "fresh", epsilon=EPSILON, steps=2, eot=2, draws=2, protocol="wor")
    with pytest.raises(ConfigError, match=f"attack {attack} does not tell what each draw breaks"):
        evaluate(Errs(at_model), *digits, epsilon=EPSILON, settings=replace(SETTINGS, images=8), attacks=[spec])


def test_a_row_that_no_class_decides_tells_of_no_collapse(rows: dict[str, Result]) -> None:
    natural = rows["Wor.Rob(1) natural-wor2"]
    assert natural.accuracy < 1
    assert "constant" not in {mark.kind for row in rows.values() for mark in row.marks}


def test_no_row_of_an_honest_module_falls_below_what_its_control_explains(
    rows: dict[str, Result], at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    """Without its errors the module keeps ``sure``; the errors keep of that what they keep of natural images."""
    plain = {row.attack: row for row in evaluate(at_model, *digits, epsilon=EPSILON, settings=SETTINGS).rows}
    sure = plain["pgd3"].accuracy / plain["natural"].accuracy
    for name in ("fresh draws pgd3", "Wor.Rob(2) pgd3-wor2", "MV.Rob(5) mv"):
        row = rows[name]
        assert row.natural is not None
        assert row.noise is not None
        assert row.accuracy >= sure * row.natural.accuracy - 0.06, (name, row)
        assert row.always >= sure * row.natural.always - 0.06, (name, row)


@pytest.mark.parametrize("name", ["quick", pytest.param("paper", marks=pytest.mark.slow), "rigorous"])
def test_nor_does_any_row_of_a_suite(at_model: nn.Module, digits: tuple[Tensor, Tensor], name: Any) -> None:
    some, settings = (digits[0][:96], digits[1][:96]), replace(SETTINGS, queries=200)
    both = [evaluate(m, *some, name, epsilon=EPSILON, settings=settings) for m in (at_model, Errs(at_model))]
    plain, erring = ([row for row in each.rows if row.epsilon] for each in both)
    sure = {row.attack: row.accuracy / both[0].rows[0].accuracy for row in plain}
    lowest = min(sure.values())
    for row in erring:
        if row.natural is not None:
            assert row.accuracy >= sure.get(row.attack, lowest) * row.natural.accuracy - 0.08, row
    assert len([row for row in erring if row.natural is not None]) >= {"quick": 4, "paper": 8, "rigorous": 8}[name]


def test_a_row_says_how_much_is_luck(rows: dict[str, Result]) -> None:
    wor, mv = rows["Wor.Rob(2) pgd3-wor2"], rows["MV.Rob(5) mv"]
    assert wor.natural is not None
    assert mv.natural is not None
    assert wor.natural.accuracy < 0.65  # 0.9 to the eighth, times what is right at all: luck alone
    assert mv.natural.accuracy > 0.9  # a vote errs seldom
    assert wor.luck == (1 - wor.natural.accuracy) / (1 - wor.accuracy)
    words = {row["attack"]: how(row) for row in to_plain([wor, mv])}
    assert "any of 2 draws at any of 4 iterates may break an image; control natural" in words["pgd3-wor2"]
    assert words["pgd3-wor2"].endswith(f"luck {100 * wor.luck:.0f} % of the loss")  # and no mark: a draw leads back
    assert not wor.marks
    assert "majority of 5 draws; of 4 votes worst" in words["mv"]


def test_one_draw_of_one_step_breaks_an_image(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0][:6]
    labels = at_model(images).argmax(dim=1)
    spec = AttackSpec("pgd", "fresh", epsilon=0.1, eot=2, draws=2, protocol="wor")
    broken = [torch.zeros(12, dtype=torch.bool) for _ in range(3)]
    broken[1][6 + 4] = True  # the second draw of the fifth image, at the second step
    right = judge(VictimModel(at_model, "at"), spec, 0, 0, 64, broken)(images, labels)["fresh"]
    assert right.tolist() == [[True]] * 4 + [[False], [True]]


def test_a_vote_is_the_majority(digits: tuple[Tensor, Tensor]) -> None:
    """Two of three passes answer 1, the third is surer of 0: the average says 0, the majority 1."""

    class Split(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            sure = torch.arange(len(images)) % 3 == 0
            return torch.where(sure[:, None], torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.1]]))

    spec = AttackSpec("pgd", "fresh", epsilon=0.1, draws=2, average=3, protocol="mv")
    right = judge(VictimModel(Split(), "split"), spec, 0, 0, 64)(digits[0][:1], torch.tensor([1]))["fresh"]
    assert right.tolist() == [[True, True]]


@pytest.mark.parametrize("name", SUITES)
def test_the_deterministic_white_box_leads_and_malt_ends(name: Any) -> None:
    kind: dict[str, Any] = {"randomized": True, "purifies": True, "transfers": True, "masked": True}
    own = [s for s in suite(name, AttackConfig(), EvaluationConfig(), **kind) if s.judged == "defense"]
    names = [spec.protocol_name for spec in own]
    assert names[:2] == ["deterministic white box"] * 2
    assert own[-1].attack == "malt"
    wanted = {"Wor.Rob(10)", "MV.Rob(11)"} if name in ("paper", "rigorous") else set()
    assert {each for each in names if "Rob" in each} == wanted


def test_a_control_tries_as_often() -> None:
    kind: dict[str, Any] = {"randomized": True, "purifies": True, "transfers": True, "masked": True}
    own = suite("paper", AttackConfig(), EvaluationConfig(), **kind)
    wor = next(spec for spec in own if spec.protocol == "wor")
    control = wor.control("natural")
    assert control is not None
    assert (control.attack, control.draws) == ("natural", (wor.steps + 1) * wor.eot)
    twice = replace(wor, restarts=2).control("natural")
    assert twice is not None
    assert twice.draws == (2 * wor.steps + 1) * wor.eot


def test_lucky_draws_do_not_outlive_a_radius_of_1() -> None:
    """An honest module that errs at random is right now and then even where its attacker has won."""
    specs = gradient_masking.check_specs(AttackConfig(), EvaluationConfig(), randomized=True, transfers=False)
    shares = {name: torch.full((50,), 0.5) for name in specs} | {"gradients": torch.ones(50)}
    for left, passed in ((0.1, True), (0.9, False)):
        shares["epsilon 1"] = torch.full((50,), left)
        found = gradient_masking.checks(
            specs, lambda spec: next(shares[name] for name, known in specs.items() if known is spec)
        )
        assert found[0].passed is passed
