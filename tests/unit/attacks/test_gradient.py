"""Attacks against plain float64 readings of their definitions, on models with known gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.expectation import expected
from dircluster.attacks.gradient import (
    cross_entropy,
    fgsm,
    kl_ascent,
    kl_divergence,
    pgd,
    projected_ascent,
    value_and_grad,
)
from dircluster.attacks.restored import perturbation
from dircluster.attacks.threat import LInf

DIM, CLASSES, N, EPSILON = 12, 4, 5, 0.1
WEIGHT = torch.randn(CLASSES, DIM, generator=rng.generator(0, "w"), dtype=torch.float64)
IMAGES = torch.rand(N, 3, 2, 2, generator=rng.generator(0, "x"), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0])


def linear(images: Tensor) -> Tensor:
    return images.flatten(1) @ WEIGHT.T


def plain_gradient(image: Tensor, label: int) -> Tensor:
    """d/dx of -log softmax(W x)_y, by hand: W^T (p - e_y)."""
    scores = WEIGHT @ image.flatten()
    p = torch.exp(scores - scores.max())
    p = p / p.sum()
    p[label] -= 1
    return (WEIGHT.T @ p).view_as(image)


def plain_pgd(image: Tensor, label: int, start: Tensor, steps: int, step: float) -> Tensor:
    x = start.clone()
    for _ in range(steps):
        x = x + step * torch.sign(plain_gradient(x, label))
        x = torch.minimum(torch.maximum(x, image - EPSILON), image + EPSILON).clamp(0, 1)
    return x


@pytest.mark.parametrize("steps", [1, 7])
def test_pgd_is_its_definition(steps: int) -> None:
    uniform = torch.rand(IMAGES.shape, generator=rng.generator(0, "u"), dtype=torch.float64)
    found = pgd(linear, IMAGES, LABELS, LInf(EPSILON), steps, 0.03, uniform)
    for i in range(N):
        start = (IMAGES[i] - EPSILON + 2 * EPSILON * uniform[i]).clamp(0, 1)
        torch.testing.assert_close(found[i], plain_pgd(IMAGES[i], int(LABELS[i]), start, steps, 0.03))


def test_fgsm_is_one_full_step() -> None:
    found = fgsm(linear, IMAGES, LABELS, LInf(EPSILON))
    for i in range(N):
        expected = (IMAGES[i] + EPSILON * torch.sign(plain_gradient(IMAGES[i], int(LABELS[i])))).clamp(0, 1)
        torch.testing.assert_close(found[i], expected)


def test_kl_is_its_definition() -> None:
    p, q = torch.softmax(linear(IMAGES), 1), torch.softmax(linear(1 - IMAGES), 1)
    plain = torch.tensor([sum(p[i, c] * torch.log(p[i, c] / q[i, c]) for c in range(CLASSES)) for i in range(N)])
    torch.testing.assert_close(
        kl_divergence(linear(IMAGES), linear(1 - IMAGES)).double(), plain.double(), rtol=1e-5, atol=1e-7
    )
    assert kl_divergence(linear(IMAGES), linear(IMAGES)).abs().max() < 1e-6


def test_the_perturbation_of_eq_4() -> None:
    """d/dx of KL(p_ref || softmax(W x)) is W^T (softmax(W x) - p_ref); the ball is not cut with [0, 1]."""
    restored = 3 * IMAGES - 1
    normal = torch.randn(IMAGES.shape, generator=rng.generator(0, "n"), dtype=torch.float64)
    found = perturbation(linear, restored, linear(restored), LInf(EPSILON), 4, 0.04, normal)
    for i in range(N):
        reference = torch.softmax(WEIGHT @ restored[i].flatten(), 0)
        x = restored[i] + 1e-3 * normal[i]
        for _ in range(4):
            gradient = WEIGHT.T @ (torch.softmax(WEIGHT @ x.flatten(), 0) - reference)
            x = x + 0.04 * torch.sign(gradient).view_as(x)
            x = torch.minimum(torch.maximum(x, restored[i] - EPSILON), restored[i] + EPSILON)
        torch.testing.assert_close(found[i], x - restored[i], rtol=0, atol=1e-9)
    assert (restored + found).min() < 0


def test_ascent_raises_what_it_ascends() -> None:
    images = IMAGES.float()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(DIM, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    before = cross_entropy(model, LABELS)(images).sum()
    assert cross_entropy(model, LABELS)(pgd(model, images, LABELS, LInf(EPSILON), 5, 0.03)).sum() > before
    reference = model(images).detach()
    moved = kl_ascent(model, images, reference, LInf(EPSILON), 5, 0.03, torch.randn_like(images))
    assert kl_divergence(reference, model(moved)).sum() > 1e-4


def test_crafting_leaves_no_gradient_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(DIM, CLASSES)).double()
    found = pgd(model, IMAGES, LABELS, LInf(EPSILON), 3, 0.03)
    assert not found.requires_grad
    assert not IMAGES.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_eot_averages_over_draws() -> None:
    draws = iter(range(100))

    def noisy(images: Tensor) -> Tensor:  # every row meets another weight
        scale = torch.tensor([1.0 + next(draws) for _ in range(len(images))], dtype=torch.float64)
        return linear(images) * scale[:, None]

    averaged, _ = expected(noisy, LABELS, 3)(IMAGES)
    plain = sum(
        torch.nn.functional.cross_entropy(
            (linear(IMAGES) * (1.0 + torch.arange(N) + N * d)[:, None]).float(), LABELS, reduction="none"
        )
        for d in range(3)
    )
    torch.testing.assert_close(averaged, plain / 3)


def test_a_flat_objective_moves_nothing() -> None:
    found = projected_ascent(value_and_grad(lambda x: 0 * x.flatten(1).sum(1)), IMAGES, IMAGES, LInf(EPSILON), 5, 0.03)
    assert torch.equal(found, IMAGES)
