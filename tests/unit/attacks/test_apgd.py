"""AutoPGD on any loss, MALT and PMA; AutoAttack standard is its authors', image by image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks import apgd as apgd_module
from dircluster.attacks.apgd import (
    CROSS_ENTROPY,
    DLR,
    Survivors,
    aimed_loss,
    apgd,
    ascents,
    dlr_loss,
    malt,
    malt_gradients,
    nearest_classes,
    probability_margin_loss,
    targeted_loss,
)
from dircluster.attacks.autoattack import RAND, autoattack, square
from dircluster.attacks.gradient import cross_entropy_loss
from dircluster.attacks.threat import L2, LInf
from dircluster.evaluation.attack_table import answers
from tests.unit.attacks.parity import fixed_images, fixed_model

THREAT = LInf(0.02)
IMAGES = fixed_images()[0].float()[:12]


def four_classes() -> nn.Module:
    """Four logits of a small network, each around zero. The fewer classes, the less AutoAttack takes."""
    whole, some = fixed_model().float(), nn.Linear(10, 4)
    with torch.no_grad():
        some.weight.copy_(torch.eye(10)[:4])
        some.bias.copy_(-whole(IMAGES).mean(dim=0)[:4])
    return nn.Sequential(whole, some)


MODULE = four_classes()
LABELS = MODULE(IMAGES).argmax(dim=1)


def model(images: Tensor) -> Tensor:
    made: Tensor = MODULE(images)
    return made


@pytest.fixture(scope="module")
def theirs() -> Tensor:
    """What pyautoattack makes of the images."""
    with torch.random.fork_rng():
        attack: Any = AutoAttack(MODULE, eps=THREAT.epsilon, seed=5, version="standard")
        attack.square.n_queries = 20
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 3
        found: Tensor = attack.run_standard_evaluation(IMAGES, LABELS, batch_size=len(IMAGES))[0]
    return found


def test_autoattack_is_the_originals_image_by_image(theirs: Tensor) -> None:
    ours, _ = autoattack(model, IMAGES, LABELS, THREAT, "standard", 5, len(IMAGES), queries=20)
    assert torch.equal(ours, theirs)
    broken = model(theirs).argmax(dim=1) != LABELS
    assert 0 < int(broken.sum()) < len(IMAGES)  # else the next tests show nothing


def test_autoattack_takes_double_logits_as_single_ones(theirs: Tensor) -> None:
    found, _ = autoattack(lambda x: model(x).double(), IMAGES, LABELS, THREAT, "standard", 5, len(IMAGES), queries=20)
    assert torch.equal(found, theirs)


def test_malt_breaks_what_autoattack_does(theirs: Tensor) -> None:
    found = malt(model, IMAGES, LABELS, THREAT, 30, 0)
    assert (found - IMAGES).abs().max() <= THREAT.epsilon + 1e-6
    kept = model(theirs).argmax(dim=1) == LABELS
    assert torch.equal(model(found).argmax(dim=1) == LABELS, kept)


@pytest.mark.parametrize("threat", [THREAT, L2(0.15)], ids=["linf", "l2"])
@pytest.mark.parametrize("leave", [True, False])
def test_the_ascent_is_the_librarys(threat: LInf | L2, leave: bool) -> None:
    """An image that is fooled passes no more, and the others go on as if it did."""
    passed: list[int] = []

    def counted(images: Tensor) -> Tensor:
        passed.append(len(images))
        return model(images)

    norm = "Linf" if isinstance(threat, LInf) else "L2"
    original: Any = APGDAttack(MODULE, 30, norm, eps=threat.epsilon, loss="ce")
    original.init_hyperparam(IMAGES)
    with rng.seeded_torch_rng(3, "start"):
        _, right, _, _ = original.attack_single_run(IMAGES, LABELS)
    with rng.seeded_torch_rng(3, "start"):
        found, margin = apgd(counted, IMAGES, LABELS, threat, lambda rows: cross_entropy_loss, 30, leave=leave)
    assert torch.equal(margin < 0, right.bool())
    assert torch.equal(model(found).argmax(dim=1) == LABELS, right.bool())
    assert passed[0] == len(IMAGES)
    assert passed[-1] == (int(right.sum()) if leave else len(IMAGES))


def test_the_copies_of_an_image_that_is_fooled_pass_no_more() -> None:
    passed: list[int] = []

    def counted(images: Tensor) -> Tensor:
        passed.append(len(images))
        return model(images)

    twice = IMAGES.repeat_interleave(2, dim=0), LABELS.repeat_interleave(2)
    _, margin = apgd(counted, *twice, THREAT, lambda rows: cross_entropy_loss, 30, copies=2)
    left = int((margin.view(-1, 2) < 0).all(dim=1).sum())
    assert 0 < left < len(IMAGES)
    assert passed[-1] == 2 * left


def test_each_image_has_the_loss_that_it_aims_at() -> None:
    logits, aim = torch.randn(24, 5, generator=rng.generator(0, "z")), torch.tensor([CROSS_ENTROPY, DLR, 4, 3] * 3)
    found = aimed_loss(aim)(logits, LABELS.repeat(2))
    for number, each in enumerate(aim.repeat(2).tolist()):
        loss = {CROSS_ENTROPY: cross_entropy_loss, DLR: dlr_loss}.get(each, targeted_loss(torch.tensor([each])))
        one = slice(number, number + 1)
        torch.testing.assert_close(found[one], loss(logits[one], LABELS.repeat(2)[one]))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_an_image_whose_answer_is_no_number_is_fooled(broken: float) -> None:
    images, labels = torch.full((6, 1, 8, 8), 0.5), torch.zeros(6, dtype=torch.int64)

    def answered(x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        true = torch.where(mean > 0.51, broken, 5 - mean)  # an infinite logit of the true class is no answer either
        return torch.stack([true, mean, 0 * mean, 0 * mean], dim=1)

    found, margin = apgd(answered, images, labels, THREAT, lambda rows: cross_entropy_loss, 30)
    assert margin.tolist() == [torch.inf] * 6
    for each in (found, square(answered, images, labels, LInf(0.1), 50, 1, 0)):
        assert (answers(answered(each)) == -1).all()


def test_a_tie_that_the_true_class_wins_is_attacked_on() -> None:
    """As of a model in half precision, many of whose logits are one."""

    def coarse(images: Tensor) -> Tensor:
        logits = model(images)
        return logits + ((8 * logits).round() / 8 - logits).detach()

    labels = coarse(IMAGES).argmax(dim=1)
    found, margin = apgd(coarse, IMAGES, labels, THREAT, lambda rows: cross_entropy_loss, 30)
    assert torch.equal(margin < 0, coarse(found).argmax(dim=1) == labels)

    def steps(images: Tensor) -> Tensor:
        mean = images.flatten(1).mean(dim=1)
        return torch.stack([0 * mean, (mean > 0.5).float() + (mean > 0.53).float() - 1], dim=1)

    images, first = torch.full((6, 1, 8, 8), 0.5), torch.zeros(6, dtype=torch.int64)
    assert (steps(square(steps, images, first, LInf(0.1), 100, 1, 0)).argmax(dim=1) == 1).all()


def test_nothing_passes_once_all_are_fooled() -> None:
    passed: list[int] = []

    def counted(images: Tensor) -> Tensor:
        passed.append(len(images))
        return model(images)

    apgd(counted, IMAGES, LABELS, LInf(0.5), lambda rows: cross_entropy_loss, 30)
    assert len(passed) < 31


def test_malt_takes_the_gradients_that_are_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apgd_module, "NEAREST", 1.0)
    passed: list[int] = []

    def counted(images: Tensor) -> Tensor:
        passed.append(len(images))
        return model(images)

    malt(counted, IMAGES, LABELS, LInf(1e-6), 10, 0, targets=2)  # nothing is fooled
    assert sum(passed) == len(IMAGES) * malt_gradients(10, 4, survivors=1.0, targets=2)
    assert set(passed) == {len(IMAGES) * aims for aims in (1, 2, 5)}  # classes side by side, then with both losses
    side_by_side = len(passed)
    passed.clear()
    malt(counted, IMAGES, LABELS, LInf(1e-6), 10, 0, targets=2, most_rows=3 * len(IMAGES))
    assert max(passed) == 3 * len(IMAGES)
    assert len(passed) > side_by_side
    passed.clear()
    malt(counted, IMAGES, LABELS, LInf(1e-6), 10, 0, targets=2, leave=False)
    assert set(passed) == {len(IMAGES)}  # whoever drew for this batch drew for no other


def test_the_second_round_is_for_the_nearest() -> None:
    passed: list[int] = []

    def counted(images: Tensor) -> Tensor:
        passed.append(len(images))
        return model(images)

    malt(counted, IMAGES, LABELS, LInf(1e-6), 10, 0, targets=2)
    assert passed[-1] == 3 * 5  # a fifth of twelve, rounded up, towards three classes and by two losses
    left = Survivors(IMAGES, LABELS, leave=True)
    left.margin = torch.linspace(-1.0, 0.2, len(IMAGES))
    left.narrow(0.2)
    assert left.rows.tolist() == [8, 9]  # of the ten whose margin is negative


def test_losses_are_the_librarys() -> None:
    logits, target = torch.randn(12, 10, generator=rng.generator(0, "z")), LABELS + 3
    library: Any = APGDAttack_targeted(MODULE, eps=0.1)
    library.y_target = target
    torch.testing.assert_close(dlr_loss(logits, LABELS), library.dlr_loss(logits, LABELS))
    torch.testing.assert_close(targeted_loss(target)(logits, LABELS), library.dlr_loss_targeted(logits, LABELS))
    twice = targeted_loss(target)(logits.repeat(2, 1), LABELS.repeat(2))
    torch.testing.assert_close(twice, targeted_loss(target)(logits, LABELS).repeat(2))
    few = torch.tensor([[1.0, 3.0, 2.5]])
    assert targeted_loss(torch.tensor([2]))(few, torch.tensor([1])).tolist() == [-0.5]
    gap = probability_margin_loss(few, torch.tensor([1]))
    torch.testing.assert_close(gap, few.softmax(1)[:, 2] - few.softmax(1)[:, 1])


def test_the_nearest_class_is_that_of_a_linear_model() -> None:
    """The second class is behind in logits and nearer in distance: its weights are longer."""
    linear = nn.Linear(64, 3, bias=True)
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[1, 0], linear.weight[2, 0] = 1.0, 10.0
        linear.bias.copy_(torch.tensor([2.0, 1.0, 0.0]))
    one = torch.zeros(1, 1, 8, 8)
    found = nearest_classes(lambda x: linear(x.flatten(1)), one, torch.tensor([0]), 5)
    assert found.tolist() == [[2, 1]]  # 2 / 10 away, and 1 / 1


def test_the_draws_of_a_step_pass_side_by_side() -> None:
    seen: list[int] = []
    noise = rng.generator(0, "noise")

    def noisy(images: Tensor) -> Tensor:
        seen.append(len(images))
        return model(images + 0.01 * torch.randn(images.shape, generator=noise))

    ascents(noisy, IMAGES, LABELS, THREAT, [cross_entropy_loss], 4, 0, draws=3, leave=False)
    assert seen == [3 * len(IMAGES)] * 5
    seen.clear()
    found, warned = autoattack(noisy, IMAGES, LABELS, THREAT, "rand", 0, eot=2, most_rows=2 * len(IMAGES))
    assert seen == [1] + [2 * len(IMAGES)] * 2 * 101
    assert warned == []
    assert (found != IMAGES).flatten(1).any(dim=1).all()  # the strongest of each is kept, fooled or not


def test_dlr_goes_on_at_images_whose_class_ranks_third() -> None:
    """There its own value is 1 and flat; elsewhere values, and before the boundary gradients, are its own."""
    logits = torch.randn(64, 6, generator=rng.generator(0, "z"), dtype=torch.float64).float().requires_grad_(True)
    labels = torch.arange(64) % 6
    steep = RAND["apgd-dlr"]
    values = [loss(logits, labels) for loss in (dlr_loss, steep)]
    assert torch.equal(*values)
    own, ours = (torch.autograd.grad(each.sum(), logits)[0] for each in values)
    rank = (logits.detach() > logits.detach().gather(1, labels[:, None])).sum(dim=1)
    assert {0, 1, 2, 3} <= set(rank.tolist())
    assert torch.equal(own[rank == 0], ours[rank == 0])
    assert own[rank == 2].abs().max() < 1e-6
    assert ours[rank == 2].abs().amax(dim=1).min() > 0.01
    large = (100 * logits.detach()).requires_grad_(True)
    (scaled,) = torch.autograd.grad(steep(large, labels).sum(), large)
    torch.testing.assert_close(100 * scaled, ours, atol=1e-5, rtol=1e-3)  # it has no scale
