"""The threat as a value: which ball a config means, and the same ball around what is no image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.gradient import cross_entropy_loss, vni_fgsm
from dircluster.attacks.restored import perturbation, restored_attack
from dircluster.attacks.threat import L2, LInf, threat_of
from dircluster.config import AttackConfig
from tests.unit.attacks.parity import fixed_images, fixed_model

IMAGES = fixed_images()[0]
NORMAL = torch.randn(IMAGES.shape, generator=rng.generator(0, "normal"), dtype=torch.float64)
UNIFORM = torch.rand(IMAGES.shape, generator=rng.generator(0, "uniform"), dtype=torch.float64)


def model(images: Tensor) -> Tensor:
    made: Tensor = fixed_model()(images)
    return made


def test_the_threat_of_a_config() -> None:
    assert threat_of(AttackConfig()) == LInf(8 / 255)
    assert threat_of(AttackConfig(norm="l2", epsilon=1.5)) == L2(1.5)


@pytest.mark.parametrize("threat", [LInf(0.3), L2(2.0)], ids=["linf", "l2"])
def test_a_ball_that_is_not_cut(threat: LInf | L2) -> None:
    free = threat.unclipped()
    assert (type(free), free.epsilon, free.pixels) == (type(threat), threat.epsilon, False)
    assert threat.unclipped(1.5).epsilon == 1.5 * threat.epsilon
    far = free.project(IMAGES + 9 * NORMAL, IMAGES) - IMAGES
    reached = far.abs().amax(dim=(1, 2, 3)) if isinstance(threat, LInf) else far.flatten(1).norm(dim=1)
    torch.testing.assert_close(reached, torch.full_like(reached, threat.epsilon))
    assert (IMAGES + far).min() < 0
    assert threat.project(IMAGES + 9 * NORMAL, IMAGES).min() >= 0


def test_the_perturbation_of_eq_4_follows_the_norm() -> None:
    restored = 3 * IMAGES - 1
    classes = model(restored).detach()
    normal = 100 * NORMAL  # far from the restored image, where the divergence is well above float32's rounding
    found = perturbation(model, restored, classes, L2(1.5), 4, 0.6, normal)
    plain = 1e-3 * normal
    for _ in range(4):
        asked = (restored + plain).requires_grad_(True)
        p, q = classes.softmax(dim=1), model(asked).softmax(dim=1)
        (gradient,) = torch.autograd.grad((p * (p / q).log()).sum(), asked)
        plain = plain + 0.6 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        plain = plain * (1.5 / plain.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)
    assert (restored + found).min() < 0


def test_the_attack_of_eq_9_follows_the_norm() -> None:
    restored, labels = 3 * IMAGES - 1, model(IMAGES).argmax(dim=1)
    found = restored_attack(model, restored, labels, L2(1.5), 5, 0.6, UNIFORM) - restored
    start = restored_attack(model, restored, labels, L2(1.5), 0, 0.6, UNIFORM)
    losses = [cross_entropy_loss(model(x), labels) for x in (restored + found, start, restored)]
    assert (losses[0] > torch.maximum(*losses[1:])).all()
    assert found.flatten(1).norm(dim=1).max() <= 1.5 + 1e-6
    assert found.abs().max() < 1.5
    assert (restored + found).min() < 0


@pytest.mark.parametrize("threat", [LInf(0.1), L2(1.5)], ids=["linf", "l2"])
def test_the_neighbors_of_vni_fgsm_lie_in_a_ball_of_the_same_norm(threat: LInf | L2) -> None:
    asked: list[Tensor] = []

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(images)
        return torch.zeros(len(images)), torch.zeros_like(images)

    vni_fgsm(both, IMAGES, threat, 1, 0.01, lambda: UNIFORM, samples=1, beta=1.5)
    neighbors = asked[1] - IMAGES
    if isinstance(threat, LInf):
        assert torch.equal(asked[1], IMAGES + 1.5 * 0.1 * (2 * UNIFORM - 1))
    else:
        torch.testing.assert_close(neighbors.flatten(1).norm(dim=1), torch.full((len(IMAGES),), 2.25).double())


@pytest.mark.parametrize("threat", [LInf(0.1), L2(1.5)], ids=["linf", "l2"])
def test_vni_fgsm_looks_ahead_by_about_a_step_for_each_that_it_has_made(threat: LInf | L2) -> None:
    asked: list[Tensor] = []

    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(images)
        return torch.zeros(len(images)), NORMAL

    vni_fgsm(both, IMAGES, threat, 3, 0.01, lambda: UNIFORM, samples=1)
    unit = threat.direction(NORMAL).flatten(1).norm(dim=1)
    for made, ahead in enumerate(asked[::2]):
        reached = threat.project(IMAGES + made * 0.01 * threat.direction(NORMAL), IMAGES)
        length = (ahead - reached).flatten(1).norm(dim=1)
        torch.testing.assert_close(length, made * 0.01 * unit, rtol=0.35, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1.5, 0.7])
def test_linf_neighbors_are_to_the_bit_the_published_ones(dtype: Any, beta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    center = torch.rand(64, 3, 8, 8, generator=generator, dtype=dtype) * 1.2 - 0.1
    uniform = torch.rand(center.shape, generator=generator, dtype=dtype)
    uniform[0], uniform[1] = 0.0, 1.0
    for epsilon in (8 / 255, 0.15, 0.1):
        radius = beta * epsilon
        assert torch.equal(LInf(epsilon).unclipped(beta).start(center, uniform), center + radius * (2 * uniform - 1))


def test_a_small_gradient_has_a_direction() -> None:
    gradient = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    gradient[2] = 0
    torch.testing.assert_close(L2(1.0).direction(1e-24 * gradient), L2(1.0).direction(gradient))
    assert L2(1.0).direction(gradient).flatten(1).norm(dim=1).tolist() == pytest.approx([1, 1, 0])
