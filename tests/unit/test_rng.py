"""Draws are a function of (seed, purpose, epoch, step), made for the global batch."""

from __future__ import annotations

import pytest
import torch

from dircluster import rng
from dircluster.models.masking import random_permutations

CPU = torch.device("cpu")


def test_every_argument_changes_the_stream() -> None:
    def first(*arguments: object) -> float:
        return torch.rand(1, generator=rng.generator(*arguments)).item()  # type: ignore[arg-type]

    draws = [first(0, "a", 0, 0), first(1, "a", 0, 0), first(0, "b", 0, 0), first(0, "a", 1, 0), first(0, "a", 0, 1)]
    assert len(set(draws)) == 5
    assert first(0, "a", 0, 0) == draws[0]


def test_workers_share_the_draws_of_one() -> None:
    whole = rng.Stream(3, 1, 2, 8, slice(0, 8), CPU)

    def permuted(generator: torch.Generator, images: int) -> torch.Tensor:
        return random_permutations(generator, images, 9)

    for kind in (lambda s: s.uniform("u", (2, 3)), lambda s: s.normal("n", (4,)), lambda s: s.sample("p", permuted)):
        parts = [kind(rng.Stream(3, 1, 2, 8, slice(start, start + 4), CPU)) for start in (0, 4)]
        assert torch.equal(torch.cat(parts), kind(whole))
        assert torch.equal(kind(whole.narrow(2, 5)), kind(whole)[2:5])


def test_an_images_draw_does_not_depend_on_its_neighbors() -> None:
    def permuted(generator: torch.Generator, images: int) -> torch.Tensor:
        return random_permutations(generator, images, 9)

    many, one = (rng.ImageStream(0, 0, 0, len(i), slice(0, len(i)), CPU, images=tuple(i)) for i in (range(10), [7]))
    for kind in (lambda s: s.uniform("u", (3,)), lambda s: s.normal("n", (3,)), lambda s: s.sample("p", permuted)):
        assert torch.equal(kind(one)[0], kind(many)[7])
        assert torch.equal(kind(many.narrow(5, 8)), kind(many)[5:8])
        assert not torch.equal(kind(many)[6], kind(many)[7])
    assert many.sample("p", lambda generator, images: None) is None


def test_ambient_draws_are_seeded_and_put_back() -> None:
    before = torch.random.get_rng_state()
    with rng.seeded_torch_rng(0, "weights"):
        first = torch.rand(3)
    with rng.seeded_torch_rng(0, "weights"):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """A stream that stands in for that of a GPU in use."""
    stream = torch.Generator()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", (stream,))
    return stream


def test_streams_of_gpus_are_seeded_and_put_back_too(gpu: torch.Generator) -> None:
    """Dropout of a target on a GPU draws from the GPU's own stream."""
    before, drawn = gpu.get_state(), []
    for purpose in ("a", "a", "b"):
        with rng.seeded_torch_rng(0, purpose):
            drawn.append(torch.rand(3, generator=gpu))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(gpu.get_state(), before)


def test_what_a_library_seeds_is_put_back_even_when_it_fails(gpu: torch.Generator) -> None:
    states = [torch.get_rng_state(), gpu.get_state()]

    def fails() -> None:
        with rng.put_back():
            gpu.manual_seed(5)  # as pyautoattack seeds every stream there is
            torch.default_generator.manual_seed(5)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(gpu.get_state(), states[1])
