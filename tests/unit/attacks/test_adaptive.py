"""Attacks on defenses: expectation, BPDA, masks (Eq. 8), restored images (Eq. 9), L2, Square and AutoAttack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks.autoattack import autoattack, square
from dircluster.attacks.expectation import expected, expected_values, straight_through
from dircluster.attacks.gradient import (
    cross_entropy,
    cross_entropy_loss,
    margin_loss,
    mi_fgsm,
    pgd,
    projected_ascent,
    strongest,
    value_and_grad,
    vni_fgsm,
)
from dircluster.attacks.masked import masked_attack
from dircluster.attacks.restored import restored_attack
from dircluster.attacks.threat import L2, LInf, Threat
from tests.unit.attacks.parity import fixed_images, fixed_model

EPSILON = 0.1
BALLS: list[Threat] = [LInf(EPSILON), L2(0.5)]


def model(images: Tensor) -> Tensor:
    made: Tensor = fixed_model().float()(images)
    return made


IMAGES = fixed_images()[0].float()
LABELS = model(IMAGES).argmax(dim=1)


def distance(found: Tensor, threat: Threat) -> float:
    moved = (found - IMAGES).flatten(1)
    return (moved.abs().amax() if isinstance(threat, LInf) else moved.norm(dim=1).max()).item()


def uniform() -> Tensor:
    return torch.rand(IMAGES.shape, generator=rng.generator(0, "u"))


@pytest.mark.parametrize("threat", BALLS, ids=["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd", "mifgsm", "vnifgsm", "square", "autoattack", "start"])
def test_every_attack_stays_in_the_ball_and_the_pixel_range(name: str, threat: LInf | L2) -> None:
    both = value_and_grad(cross_entropy(model, LABELS))
    step = threat.epsilon / 4
    version: Any = "standard" if isinstance(threat, LInf) else "rand"  # FAB takes long in L2
    found = {
        "pgd": lambda: pgd(model, IMAGES, LABELS, threat, 5, step, uniform()),
        "mifgsm": lambda: mi_fgsm(both, IMAGES, threat, 5, step),
        "vnifgsm": lambda: vni_fgsm(both, IMAGES, threat, 3, step, uniform, samples=2),
        "square": lambda: square(model, IMAGES, LABELS, threat, 30, 1, 0),
        "autoattack": lambda: autoattack(model, IMAGES[:4], LABELS[:4], threat, version, 0, eot=1, queries=20)[0],
        "start": lambda: threat.start(IMAGES, uniform()),
    }[name]()
    found = torch.cat([found, IMAGES[len(found) :]])
    assert distance(found, threat) <= threat.epsilon * (1 + 1e-5)
    assert found.min() >= 0
    assert found.max() <= 1
    assert distance(found, threat) > 0.5 * threat.epsilon


def test_l2_is_its_definition() -> None:
    center = torch.full((1, 1, 2, 2), 0.5)
    far = center + torch.tensor([[[[0.3, 0.0], [0.4, 0.0]]]])
    torch.testing.assert_close(L2(0.25).project(far, center) - center, (far - center) / 2)
    near = center + 0.01
    assert torch.equal(L2(0.25).project(near, center), near)
    torch.testing.assert_close(L2(1.0).direction(far - center), (far - center) / 0.5)
    assert torch.equal(L2(1.0).direction(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))


def test_the_margin_is_its_definition() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert margin_loss(logits, torch.tensor([1, 2])).tolist() == [-1.0, 5.0]


def test_a_bound_on_rows_changes_nothing() -> None:
    seen: list[int] = []

    def noisy(images: Tensor) -> Tensor:
        seen.append(len(images))
        return model(images + 0.1 * torch.rand(images.shape, generator=draws))

    outcomes = []
    for most in (None, 2 * len(IMAGES), 1):
        draws = rng.generator(0, "noise")
        outcomes.append(expected(noisy, LABELS, 5, most_rows=most)(IMAGES))
    for values, gradient in outcomes[1:]:
        torch.testing.assert_close(values, outcomes[0][0])
        torch.testing.assert_close(gradient, outcomes[0][1], rtol=1e-4, atol=1e-6)
    assert seen == [80, 32, 32, 16, *[16] * 5]


def test_the_last_iterate_counts_and_the_best_restart() -> None:
    """Of values that draws blur, the highest is the luckiest."""
    peak = IMAGES + 0.05  # an objective whose top lies inside the ball: large steps run past it

    def objective(images: Tensor) -> Tensor:
        return -(images - peak).square().flatten(1).sum(dim=1)

    both = value_and_grad(objective)
    last = projected_ascent(both, IMAGES, IMAGES, LInf(0.3), 8, 0.04)  # past the top: at 0.08, after 0.04
    kept = projected_ascent(both, IMAGES, IMAGES, LInf(0.3), 1, 0.04)
    assert (objective(kept) > objective(last)).all()
    assert (objective(last) > objective(IMAGES)).all()
    every_second = (torch.arange(len(IMAGES)) % 2 == 0)[:, None, None, None]
    restarts = [torch.where(every_second, kept, last), torch.where(every_second, last, kept)]
    assert torch.equal(strongest(objective, restarts), kept)


def test_bpda_goes_forward_through_and_backward_around() -> None:
    images = IMAGES.clone().requires_grad_(True)
    made = straight_through(images, (images * 4).round() / 4)
    assert torch.equal(made, (IMAGES * 4).round() / 4)
    (gradient,) = torch.autograd.grad((made * torch.arange(64.0).view(1, 1, 8, 8)).sum(), images)
    assert torch.equal(gradient[0, 0].flatten(), torch.arange(64.0))
    both = value_and_grad(cross_entropy(lambda x: model((x * 4).round() / 4), LABELS))
    assert both(IMAGES)[1].abs().max() == 0
    around = value_and_grad(cross_entropy(lambda x: model(straight_through(x, (x * 4).round() / 4)), LABELS))
    assert (around(IMAGES)[1] != 0).any()


def test_the_masked_attack_moves_kept_pixels_alone_step_by_step() -> None:
    """Two masks of a left and a right half; each step ascends through one of them (Eq. 8), by hand."""
    halves = torch.stack([torch.arange(8) < 4, torch.arange(8) >= 4]).float()  # (K, width)

    def through(images: Tensor, kept: Tensor) -> Tensor:
        return model(images * halves[kept[0, :, 0]][:, None, None, :])

    def pixels(kept: Tensor) -> Tensor:
        return halves[kept[..., 0]][:, :, None, None, :].expand(-1, -1, 1, 8, 8)

    kept = torch.arange(2)[:, None, None].expand(2, len(IMAGES), 1)
    one = masked_attack(through, IMAGES, LABELS, LInf(EPSILON), 1, 0.03, lambda: kept, pixels)
    assert torch.equal(one[..., 4:], IMAGES[..., 4:])
    x = IMAGES
    for step in range(4):
        half = halves[step % 2]
        _, gradient = value_and_grad(lambda z, half=half: cross_entropy_loss(model(z * half), LABELS))(x)
        x = LInf(EPSILON).project(x + 0.03 * (gradient * half).sign(), IMAGES)
    found = masked_attack(through, IMAGES, LABELS, LInf(EPSILON), 4, 0.03, lambda: kept, pixels)
    torch.testing.assert_close(found, x)


def test_the_attack_of_eq_9_is_not_cut_with_the_pixel_range() -> None:
    restored = 3 * IMAGES - 1
    found = restored_attack(model, restored, LABELS, LInf(EPSILON), 5, 0.03, uniform())
    assert (found - restored).abs().max() <= EPSILON + 1e-6
    assert found.min() < 0
    assert cross_entropy_loss(model(found), LABELS).sum() > cross_entropy_loss(model(restored), LABELS).sum()


def test_square_averages_its_margin_over_draws() -> None:
    """Every second row meets a shifted model: one draw alone would find images broken that the mean does not."""
    shift = torch.arange(10.0) * 0.002

    def odd(images: Tensor) -> Tensor:
        return model(images) + shift * (torch.arange(len(images)) // len(IMAGES) % 2)[:, None]

    averaged, alone = (expected_values(odd, LABELS, draws, margin_loss) for draws in (2, 1))
    assert not torch.allclose(averaged(IMAGES), alone(IMAGES))
    both = (margin_loss(model(IMAGES), LABELS) + margin_loss(model(IMAGES) + shift, LABELS)) / 2
    torch.testing.assert_close(averaged(IMAGES), both)
    found = [square(odd, IMAGES, LABELS, LInf(EPSILON), 60, 2, 0, rows) for rows in (None, 10**6)]
    assert torch.equal(*found)
    assert averaged(found[0]).sum() > averaged(IMAGES).sum()


@pytest.mark.parametrize("threat", [LInf(0.1), L2(0.5)], ids=["linf", "l2"])
@pytest.mark.parametrize("shape", [(12, 12), (13, 13), (4, 4), (20, 10), (10, 20)], ids=str)
def test_square_takes_images_of_any_size(shape: tuple[int, int], threat: LInf | L2) -> None:
    """In L2 the library's tiles reach beyond the edge where a side has 4, 12, 14, 18, 19 or 24 pixels."""
    images = torch.rand(6, 1, *shape)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1], 10))
    labels = linear(images).argmax(dim=1)
    found = square(linear, images, labels, threat, 40, 1, 0)
    assert found.shape == images.shape
    moved = (found - images).flatten(1)
    length = moved.abs().max() if isinstance(threat, LInf) else moved.norm(dim=1).max()
    assert length <= threat.epsilon * (1 + 1e-5)
    assert margin_loss(linear(found), labels).mean() > margin_loss(linear(images), labels).mean()


@pytest.mark.long
def test_autoattack_leaves_square_out_where_it_does_not_fit() -> None:
    images, linear = torch.rand(1, 1, 12, 12), nn.Sequential(nn.Flatten(), nn.Linear(144, 2))
    labels = linear(images).argmax(dim=1)
    _, warned = autoattack(linear, images, labels, L2(1e-4), "standard", 0, queries=5)
    assert warned[1:] == ["left out in L2 on images of 12 x 12, where its tiles do not fit: square"]
    _, warned = autoattack(linear, images, labels, LInf(1e-4), "standard", 0, queries=5)
    assert warned == ["left out with 2 classes: apgd-t"]


@pytest.mark.long
def test_autoattack_speaks_and_leaves_the_global_stream_alone() -> None:
    state = torch.get_rng_state()
    _, quiet = autoattack(model, IMAGES[:4], LABELS[:4], LInf(EPSILON), "standard", 0, queries=5)
    assert quiet == []
    draws = rng.generator(0, "noise")

    def noisy(images: Tensor) -> Tensor:
        return model(images + 0.3 * torch.rand(images.shape, generator=draws))

    _, warned = autoattack(noisy, IMAGES[:4], LABELS[:4], LInf(EPSILON), "standard", 0, queries=5)
    assert any("randomized defense" in line for line in warned)
    detached = autoattack(lambda x: model(x.detach()), IMAGES[:4], LABELS[:4], LInf(EPSILON), "rand", 0, eot=1)
    assert any("zero gradient" in line for line in detached[1])
    assert torch.equal(torch.get_rng_state(), state)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    _, few = autoattack(two, IMAGES[:4], two(IMAGES[:4]).argmax(1), LInf(EPSILON), "standard", 0, queries=5)
    assert few[0] == "left out with 2 classes: apgd-t"
