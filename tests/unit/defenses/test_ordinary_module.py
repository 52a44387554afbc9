"""A defense is called, copied, cast, traced and wrapped as any module is: the right logits, or one line."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import ConfigError
from dircluster.defenses.base import MOST_DRAWS, Defended, Purifier
from dircluster.defenses.identity import Identity
from dircluster.defenses.table import find_defense
from dircluster.evaluation.meeting import meet
from dircluster.evaluation.victim import VictimModel
from dircluster.presets import RUNS, preset, presets_of

IMAGES = torch.rand(6, 1, 8, 8, generator=rng.generator(0, "images"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)])
def test_images_of_any_float_are_taken(defense: Defended, dtype: torch.dtype, tolerance: float) -> None:
    fixed = defense.fixed(1)
    found = fixed(IMAGES.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, fixed(IMAGES), atol=tolerance, rtol=tolerance)
    assert torch.equal(fixed(IMAGES.to(memory_format=torch.channels_last)), fixed(IMAGES))


@pytest.mark.parametrize("name", [name for name in RUNS if not name.endswith("_a")])
def test_every_defense_answers_on_any_device_in_any_precision_and_in_inference_mode(name: str) -> None:
    run = preset(next(each for each in presets_of(name) if each.startswith("digits") and each.endswith("_smoke")))
    kind = find_defense(name)
    modules = {each: kind.build(run, each).eval() for each in ("classifier", *kind.modules(run))}
    fixed = kind.defended(run, modules).fixed(1)
    with torch.no_grad():
        expected = fixed(IMAGES)
    with torch.inference_mode():
        assert torch.equal(fixed(IMAGES), expected)
        assert torch.equal(fixed(IMAGES.clone()), expected)  # made in inference mode
    drawn = fixed.purifier.draw(torch.Generator(), 2)
    with torch.device("meta"):  # another default, such as a GPU, is none for draws
        same = fixed.purifier.draw(torch.Generator(), 2)
        assert (drawn is None) == (same is None)
        assert drawn is None or torch.equal(drawn, same)
    for seen in fixed.purifier.visible(IMAGES[:2].to("meta"), drawn):
        assert (seen.device.type, seen.shape) == ("meta", IMAGES[:2].shape)  # where images are, wherever draws are
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        few = IMAGES[:1].to(dtype)
        torch.testing.assert_close(fixed(few), fixed(few.float()), atol=1e-4, rtol=1e-4)
        made = copy.deepcopy(fixed).to(dtype)
        asked = few.clone().requires_grad_()
        found = made(asked)
        assert found.dtype == dtype
        (slope,) = torch.autograd.grad(found.sum(), asked)
        assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.mul(255).to(torch.uint8), r"must be floats in \[0, 1\], got torch.uint8; divide by 255"),
        (IMAGES > 0.5, r"must be floats in \[0, 1\], got torch.bool"),
        (IMAGES.permute(0, 2, 3, 1), r"got \(6, 8, 8, 1\): channels come first, images.permute\(0, 3, 1, 2\)"),
        (IMAGES[0], r"must be \(N, 1, 8, 8\), got \(1, 8, 8\): give a batch, images\[None\]"),
        (IMAGES.expand(6, 3, 8, 8), r"must be \(N, 1, 8, 8\), got \(6, 3, 8, 8\)$"),
        (torch.rand(2, 1, 4, 16), r"must be \(N, 1, 8, 8\), got \(2, 1, 4, 16\)$"),
        (IMAGES.numpy(), r"must be a tensor \(N, C, H, W\), got ndarray"),
    ],
)
def test_images_that_it_does_not_take_are_one_line(defense: Defended, images: Any, message: str) -> None:
    for call in (defense, defense.fixed(0, draws=2), defense.restore):
        with pytest.raises(ConfigError, match=message):
            call(images)


def test_no_images_have_no_logits(defense: Defended) -> None:
    for module in (defense, defense.fixed(0), defense.fresh(draws=3)):
        assert module(IMAGES[:0]).shape == (0, 10)
    assert defense.restore(IMAGES[:0]).shape == (0, 1, 8, 8)


def test_no_images_change_no_statistics() -> None:
    normalization = nn.BatchNorm1d(64)
    whole = Defended(Identity(), nn.Sequential(nn.Flatten(), normalization, nn.Linear(64, 10))).train()
    assert whole(IMAGES[:0]).shape == (0, 10)
    assert normalization.num_batches_tracked == 0
    assert normalization.training


@pytest.mark.parametrize("draws", [0, -1, 1.5, "3", True, MOST_DRAWS + 1, 2**70])
def test_draws_are_whole_numbers_that_a_pass_may_hold(defense: Defended, draws: Any) -> None:
    views: tuple[Callable[[], Defended], ...] = (
        lambda: defense.fresh(draws=draws),
        lambda: defense.fixed(0, draws=draws),
        lambda: defense.averaged(draws),
    )
    for view in views:
        with pytest.raises(ConfigError, match=f"draws must be a whole number from 1 to {MOST_DRAWS}, got "):
            view()


@pytest.mark.parametrize(("cast", "tolerance"), [("half", 2e-2), ("bfloat16", 5e-2), ("double", 1e-5)])
def test_it_is_cast_as_a_whole(defense: Defended, cast: str, tolerance: float) -> None:
    expected, images = defense.fixed(1)(IMAGES), IMAGES.clone().requires_grad_()
    made = getattr(defense, cast)()
    found = made.fixed(1)(images)
    assert found.dtype == next(made.parameters()).dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    found.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


def test_double_precision_is_kept_all_the_way(defense: Defended) -> None:
    image = IMAGES[:1].double().requires_grad_()
    assert torch.autograd.gradcheck(defense.double().fixed(0), (image,), fast_mode=True)


def test_copies_draw_apart_unless_they_are_seeded(defense: Defended) -> None:
    stored = pickle.dumps(defense)
    drawn = [copy.deepcopy(defense).draw(4), copy.deepcopy(defense).draw(4), defense.draw(4)]
    drawn += [pickle.loads(stored).draw(4), pickle.loads(stored).draw(4)]
    assert len({str(each) for each in drawn}) == 5
    seeded = defense.fresh(seed=3)
    assert torch.equal(copy.deepcopy(seeded).draw(4), seeded.draw(4))


def test_forked_workers_draw_apart(defense: Defended) -> None:
    def in_child(module: Defended) -> str:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, str(module.draw(2)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with os.fdopen(reading) as stream:
            return stream.read()

    assert len({in_child(defense) for _ in range(3)} | {str(defense.draw(2))}) == 4
    seeded = defense.fresh(seed=3)
    assert in_child(seeded) == in_child(seeded) != ""


@pytest.mark.parametrize("form", ["fixed", "given"])
def test_a_trace_takes_any_number_of_images(defense: Defended, form: str) -> None:
    given = form == "given"
    module = defense if given else defense.fixed(1)
    traced = torch.jit.trace(module, (IMAGES[:2], defense.draw(2)) if given else IMAGES[:2])
    inputs = (IMAGES, defense.draw(6)) if given else (IMAGES,)
    torch.testing.assert_close(traced(*inputs), module(*inputs))


def test_a_trace_of_fresh_draws_is_refused(defense: Defended) -> None:
    with pytest.raises(ConfigError, match=r"would keep one draw for all calls: export defense.fixed\(seed\), or give"):
        torch.jit.trace(defense, IMAGES)
    with pytest.raises(ConfigError, match="would keep one draw for all calls"):
        torch.export.export(defense, (IMAGES,))


@pytest.mark.long
@pytest.mark.parametrize("form", ["fixed", "given"])
def test_an_export_takes_any_number_of_images(defense: Defended, form: str) -> None:
    given, number = form == "given", {0: torch.export.Dim("number", min=1, max=512)}
    module = defense if given else defense.fixed(1)
    inputs = (IMAGES[:3], defense.draw(3)) if given else (IMAGES[:3],)
    exported = torch.export.export(module, inputs, dynamic_shapes=(number,) * len(inputs)).module()
    others = (IMAGES, defense.draw(6)) if given else (IMAGES,)
    torch.testing.assert_close(exported(*others), module(*others))


@pytest.mark.long
@pytest.mark.parametrize("form", ["fixed", "given"])
def test_an_onnx_export_gives_the_same_logits(defense: Defended, form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    given, number = form == "given", {0: torch.export.Dim("number", min=1, max=512)}
    module, names = defense if given else defense.fixed(1), ["images", "draws"] if given else ["images"]
    inputs = (IMAGES[:3], defense.draw(3)) if given else (IMAGES[:3],)
    file = tmp_path / "defense.onnx"
    torch.onnx.export(module, inputs, file, dynamo=True, input_names=names, dynamic_shapes=(number,) * len(inputs))
    others = (IMAGES, defense.draw(6)) if given else (IMAGES,)
    found = runtime.InferenceSession(file).run(None, {k: v.numpy() for k, v in zip(names, others, strict=True)})[0]
    torch.testing.assert_close(torch.from_numpy(found), module(*others))


def test_it_is_mapped_over_images(defense: Defended) -> None:
    fixed = defense.fixed(1)
    mapped = torch.func.vmap(lambda image: fixed(image[None])[0])
    torch.testing.assert_close(mapped(IMAGES), fixed(IMAGES))
    slopes = torch.func.vmap(torch.func.jacrev(lambda image: fixed(image[None])[0]))(IMAGES)
    assert slopes.shape == (6, 10, 1, 8, 8)


@pytest.mark.long
def test_a_compiled_one_draws_at_each_call(defense: Defended) -> None:
    compiled = torch.compile(defense, backend="eager")
    assert not torch.equal(compiled(IMAGES), compiled(IMAGES))
    torch.testing.assert_close(torch.compile(defense.fixed(1), backend="eager")(IMAGES), defense.fixed(1)(IMAGES))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Any:
        return self.inner(images)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.Sequential,
        nn.DataParallel,
        lambda defense: torch.compile(defense, backend="eager"),
        lambda defense: nn.Sequential(nn.DataParallel(torch.compile(defense, backend="eager"))),
    ],
)
def test_a_wrapped_one_is_judged_as_itself(defense: Defended, wrap: Callable[[Any], nn.Module]) -> None:
    victim = VictimModel(wrap(defense), "wrapped")
    assert victim.module is defense
    assert victim.drawn


def test_one_in_somebodys_module_draws_from_the_stream_that_is_held_fixed(defense: Defended) -> None:
    state = defense._generator.get_state()
    for module in (Wrapper(defense), nn.Sequential(defense, nn.Identity()), lambda images: defense(images)):
        victim = VictimModel(module, "wrapped")
        meet(victim, IMAGES, highest=9)  # raises where the same stream gives other logits
        assert victim.randomized
    assert torch.equal(defense._generator.get_state(), state)  # its own stream is left as it was


class Doubling(Purifier):
    """Takes images of any size."""

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        return 2 * images


def test_a_purifier_of_any_images_is_asked_for_no_size() -> None:
    defense = Defended(Doubling(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert defense(torch.rand(2, 5, 3, 7)).shape == (2, 5)
    with pytest.raises(ConfigError, match=r"images must be \(N, C, H, W\), got \(3, 7\)"):
        defense(torch.rand(3, 7))
