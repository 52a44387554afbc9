"""Draws are a function of (seed, purpose, epoch, step), made for the global batch."""

from __future__ import annotations

import torch

from dircluster import rng

CPU = torch.device("cpu")


def test_every_argument_changes_the_stream() -> None:
    def first(*arguments: object) -> float:
        return torch.rand(1, generator=rng.generator(*arguments)).item()  # type: ignore[arg-type]

    draws = [first(0, "a", 0, 0), first(1, "a", 0, 0), first(0, "b", 0, 0), first(0, "a", 1, 0), first(0, "a", 0, 1)]
    assert len(set(draws)) == 5
    assert first(0, "a", 0, 0) == draws[0]


def test_workers_share_the_draws_of_one() -> None:
    whole = rng.Stream(3, 1, 2, 8, slice(0, 8), CPU)
    for kind in (lambda s: s.uniform("u", (2, 3)), lambda s: s.normal("n", (4,)), lambda s: s.permutations("p", 9)):
        parts = [kind(rng.Stream(3, 1, 2, 8, slice(start, start + 4), CPU)) for start in (0, 4)]
        assert torch.equal(torch.cat(parts), kind(whole))
        assert torch.equal(kind(whole.narrow(2, 5)), kind(whole)[2:5])


def test_an_images_draw_does_not_depend_on_its_neighbours() -> None:
    many = rng.per_image(0, "x", torch.arange(10), (3,))
    assert torch.equal(rng.per_image(0, "x", torch.tensor([7]), (3,))[0], many[7])


def test_ambient_draws_are_seeded_and_put_back() -> None:
    before = torch.random.get_rng_state()
    with rng.ambient(0, "weights"):
        first = torch.rand(3)
    with rng.ambient(0, "weights"):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before)
