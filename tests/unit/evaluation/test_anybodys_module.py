"""Whatever form a module and its images come in: the numbers of the plain call, or one line; nothing of it changes."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dircluster import evaluate, load_defense
from dircluster.config import ConfigError, EvaluationConfig
from dircluster.defenses.base import Defended
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.session import EvaluationReport

QUICK = EvaluationConfig(images=12, batch_size=8, steps=3, queries=50)
IMAGES = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
LABELS = torch.arange(12) % 3


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


PLAIN = plain()
for row, label in enumerate(PLAIN(IMAGES).argmax(dim=1).tolist()):
    LABELS[row] = label if row % 4 else LABELS[row]  # three in four are right


def judged(module: Any = PLAIN, images: Any = IMAGES, labels: Any = LABELS, **more: Any) -> EvaluationReport:
    return evaluate(module, images, labels, **{"epsilon": 0.1, "settings": QUICK, **more})


REFERENCE = judged()


class Then(nn.Module):
    """The plain module and a function of its images and logits."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.function = plain(), function

    def forward(self, images: Tensor) -> Any:
        return self.function(images, self.inner(images))


@dataclasses.dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


@dataclasses.dataclass
class Scores:
    scores: Tensor
    hidden: None = None


Pair = namedtuple("Pair", ["features", "logits"])


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()

    def forward(self, images: Tensor) -> Tensor:
        images.mul_(2).sub_(1)
        made: Tensor = self.inner(images.add_(1).div_(2))
        return made


class Running(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        made: Tensor = self.inner(images)
        return made


class Named(nn.Module):
    """Has a restore and a classifier that are no purifier and no classifier of images."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = plain()[:3], plain()[3]

    def restore(self, folder: str) -> None:
        raise FileNotFoundError(folder)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.classifier(self.body(images))
        return made


def exported(**how: Any) -> nn.Module:
    return torch.export.export(plain().eval(), (IMAGES[:8],), **how)  # type: ignore[return-value]


def frozen() -> nn.Module:
    example = torch.jit.trace(plain().eval(), IMAGES[:2])
    made: nn.Module = torch.jit.freeze(example)
    return made


def around() -> Callable[[Tensor], Tensor]:
    inner = plain().train()
    return lambda images: inner(images)  # type: ignore[no-any-return]


def logits_of(images: Tensor) -> Tensor:
    made: Tensor = PLAIN(images)
    return made


FORMS: dict[str, tuple[Callable[[], Any], str]] = {
    "a function": (lambda: logits_of, ""),
    "a function around a module": (around, ""),
    "a method": (lambda: plain().forward, ""),
    "a tuple": (lambda: Then(lambda x, z: (z, x)), "returns tuple, whose first element is taken for its logits"),
    "a list": (lambda: Then(lambda x, z: [z]), "list, whose first element is taken"),
    "a named tuple": (lambda: Then(lambda x, z: Pair(x, z)), "Pair, whose .logits are taken"),
    "a dict": (lambda: Then(lambda x, z: {"features": x, "logits": z}), "dict, whose logits are taken"),
    "a dict of one": (lambda: Then(lambda x, z: {"out": z}), "dict, whose only tensor, out, is taken"),
    "a dataclass": (lambda: Then(lambda x, z: Answer(z)), "Answer, whose .logits are taken"),
    "a dataclass of one tensor": (lambda: Then(lambda x, z: Scores(z)), "Scores, whose only tensor, scores, is taken"),
    "one that changes its input": (InPlace, ""),
    "one that changes a buffer": (Running, ""),
    "torch.export": (lambda: exported(dynamic_shapes=({0: torch.export.Dim("n", min=1, max=1024)},)), ""),
    "a frozen script": (frozen, ""),
    "names that mean something else": (Named, "restore and classifier are not a purifier"),
    "float64": (lambda: plain(torch.float64), "takes float64: images are passed on as that"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_judged_as_the_plain_module_is(form: str) -> None:
    made, note = FORMS[form]
    images = IMAGES.clone()
    found = judged(made(), images)
    assert torch.equal(images, IMAGES)
    key = [(row.attack, row.correct, row.judged, row.marks) for row in found.rows]
    assert key == [(row.attack, row.correct, row.judged, row.marks) for row in REFERENCE.rows]
    assert len(found.notes) == bool(note)
    assert note in "".join(found.notes)
    assert all(f"note: {line}" in str(found) for line in found.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_modules_are_judged(dtype: torch.dtype) -> None:
    found = judged(plain(dtype))
    assert found.notes == [f"the defense takes {str(dtype)[6:]}: images are passed on as that"]
    assert abs(found.rows[0].correct - REFERENCE.rows[0].correct) <= 1
    assert found.rows[1].marks == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_loaded_defense_of_another_dtype_is_judged(dtype: torch.dtype) -> None:
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    defense = load_defense("zoo:digits-dir")
    labels = defense.fixed(0)(images).argmax(dim=1)
    whole, found = (judged(module, images, labels) for module in (defense, copy.deepcopy(defense).to(dtype)))
    assert [row.attack for row in found.rows] == [row.attack for row in whole.rows]
    most = 1.5 / 12 if dtype == torch.float64 else 3.5 / 12
    assert all(abs(one.accuracy - two.accuracy) < most for one, two in zip(found.rows, whole.rows, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_defense_of_another_dtype_over_a_classifier_that_does_not_cast_is_judged(dtype: torch.dtype) -> None:
    purifier = load_defense("zoo:digits-dir").purifier
    defense = Defended(purifier, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).to(dtype)
    few = EvaluationConfig(steps=1, queries=2, eot=1, draws=1, resubmissions=1, votes=1)
    found = evaluate(defense, torch.rand(4, 1, 8, 8), torch.arange(4), "paper", settings=few)
    assert {"natural", "masked1", "restored1-from-natural"} <= {row.attack for row in found.rows}


@pytest.mark.parametrize(
    "given",
    [
        {"images": IMAGES.double()},
        {"images": IMAGES.numpy()},
        {"images": IMAGES.clone().requires_grad_(True)},
        {"images": IMAGES.to_sparse()},
        {"labels": LABELS.to_sparse()},
        {"labels": LABELS.numpy()},
        {"labels": LABELS.tolist()},
        {"labels": LABELS.to(torch.int8)},
        {"labels": LABELS.numpy().astype(np.uint16)},
        {"epsilon": "1/10"},
        {"epsilon": np.float32(0.1)},
        {"epsilon": np.float64(0.1)},
        {"epsilon": torch.tensor(0.1)},
        {"step_size": "0.025"},
        {"seed": np.int64(0)},
    ],
    ids=str,
)
def test_inputs_of_any_form_give_the_same_rows(given: dict[str, Any]) -> None:
    assert judged(**given).rows == REFERENCE.rows


def test_half_images_are_what_they_hold() -> None:
    half = IMAGES.half()
    assert judged(images=half).rows == judged(images=half.float()).rows


def test_pixels_that_rounding_left_outside_are_clamped_and_said() -> None:
    images = IMAGES.clone()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = -2.98e-08, 1 + 5e-7
    found = judged(images=images)
    assert found.rows == judged(images=images.clamp(0, 1)).rows
    assert found.notes[0].startswith("pixels from -2.98")
    images[0, 0, 0, 0] = -1e-5
    with pytest.raises(ConfigError, match="must lie in"):
        judged(images=images)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"images": IMAGES.to("meta")}, "images lie on the meta device"),
        ({"labels": LABELS.to("meta")}, "labels lie on the meta device"),
        ({"images": torch.nested.nested_tensor([IMAGES[0]])}, "got a nested one"),
        ({"images": torch.quantize_per_tensor(IMAGES, 0.1, 0, torch.quint8)}, "got a quantized one"),
    ],
    ids=str,
)
def test_tensors_without_plain_numbers_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judged(**given)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
        assert torch.get_default_device().type == device
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "inside",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: default_dtype(torch.float64),
        lambda: default_device("meta"),
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
)
def test_surroundings_change_nothing(inside: Callable[[], Any]) -> None:
    with inside():
        assert judged().rows == REFERENCE.rows
        made = copy.deepcopy(PLAIN)  # in inference mode its parameters pass no gradient
        assert judged(made, IMAGES.clone(), LABELS.clone()).rows == REFERENCE.rows


def test_inputs_are_read_where_the_default_device_holds_no_values() -> None:
    with default_device("meta"):
        assert judged(images=IMAGES.numpy(), labels=LABELS.tolist(), epsilon=np.float32(0.1)).rows == REFERENCE.rows


def test_a_module_makes_tensors_where_its_surroundings_do() -> None:
    made: list[Tensor] = []
    module = Then(lambda x, z: (made.append(torch.zeros(1)), z)[1])
    with default_device("meta"):
        judged(module)
    assert {tensor.device.type for tensor in made} == {"meta"}


def test_all_is_as_before() -> None:
    class Careless(Running):
        def forward(self, images: Tensor) -> Tensor:
            np.random.rand(), random.random(), torch.rand(1)
            return super().forward(images)

    module = Careless()
    module.train()
    module.inner[1].eval()
    module.inner[3].weight.requires_grad_(False)
    module.inner[1].weight.grad = torch.ones_like(module.inner[1].weight)
    surrogate = nn.Sequential(plain(), nn.AlphaDropout(0.1))
    images = IMAGES.clone().requires_grad_(True)

    def state() -> list[Any]:
        parts = [*module.parameters(), *surrogate.parameters()]
        return [
            [part.training for part in [*module.modules(), *surrogate.modules()]],
            [part.requires_grad for part in [*parts, images]],
            [None if part.grad is None else part.grad.sum().item() for part in [*parts, images]],
            [buffer.item() for buffer in module.buffers()],
            images.tolist(),
            (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        ]

    before = state()
    judged(module, images, surrogate=surrogate, verdict=True)
    assert state() == before


WIDE = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
FOUR = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("surrogate", "message"),
    [
        (WIDE, r"the surrogate cannot take images of shape \(1, 4, 4\)"),
        (FOUR, "the surrogate gives 4 classes, but the defense 3"),
        (Then(lambda x, z: z.softmax(1)), "the surrogate returns probabilities"),
        (Then(lambda x, z: "z"), "the surrogate must return logits .*, got str"),
        ([1], "the surrogate must be a module or a function of images, got list"),
    ],
)
def test_a_surrogate_that_does_not_fit_is_one_line(surrogate: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        judged(surrogate=surrogate)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("surrogate", [plain(torch.float64), Then(lambda x, z: {"logits": z}), logits_of])
def test_a_surrogate_of_any_form_is_what_the_plain_one_is(surrogate: Any) -> None:
    rows = [{r.attack: (r.correct, r.judged) for r in judged(surrogate=s).rows} for s in (surrogate, plain())]
    assert rows[0] == rows[1]
    assert "transfer-pgd3" in rows[0]


def test_a_module_that_breaks_under_attack_is_judged_to_the_end() -> None:
    breaking = Then(lambda x, z: torch.where(x.flatten(1).amax(dim=1, keepdim=True) > 0.96, torch.nan, z))
    auto = AttackSpec("autoattack", epsilon=0.1, steps=10)
    square = AttackSpec("square", epsilon=0.1, steps=10)
    rows = {row.attack: row for row in judged(breaking, IMAGES[:6], LABELS[:6], attacks=[auto, square]).rows}
    assert rows["natural"].marks == ()
    assert all(rows[name].marks for name in ("pgd3", "pgd3-margin", "autoattack", "square"))
    assert rows["pgd3"].accuracy < rows["natural"].accuracy


class Numpy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.from_numpy(images.numpy().reshape(len(images), -1)[:, :3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"module": [1, 2]}, "must be a module or a function of images, got list"),
        ({"module": nn.Flatten}, "a function of images, got the class Flatten"),
        ({"module": WIDE}, r"the defense cannot take images of shape \(1, 4, 4\): RuntimeError"),
        ({"module": Then(lambda x, z: {"a": z, "b": z})}, "must return logits .*, got dict"),
        ({"module": Then(lambda x, z: None)}, "must return logits .*, got NoneType"),
        ({"module": Numpy()}, "the defense cannot be differentiated: RuntimeError: Can't call numpy"),
        ({"module": exported()}, "takes 8 images, but not 1 .export it with a batch of any size"),
        ({"labels": ["cat"] * 12}, "labels must be a tensor, an array or a list of numbers"),
        ({"labels": LABELS.float()}, "labels must be 12 whole numbers"),
        ({"labels": LABELS[:5]}, "labels must be 12 whole numbers"),
        ({"labels": LABELS > 3}, "labels must be 12 whole numbers, got torch.bool"),
        ({"images": (IMAGES * 255).byte().numpy()}, "divide by 255"),
        ({"images": IMAGES[:, :0]}, "the images have no pixels"),
        ({"images": "photos/"}, "images must be a tensor, an array or a list of numbers"),
        ({"images": IMAGES.to("meta")}, "images lie on the meta device"),
        ({"module": copy.deepcopy(PLAIN).to("meta")}, "the defense lies on the meta device"),
        ({"surrogate": copy.deepcopy(PLAIN).to("meta")}, "the surrogate lies on the meta device"),
        ({"module": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))}, "the defense has weights without a size"),
        ({"epsilon": "a lot"}, "epsilon must be a number or a fraction such as 8/255, got 'a lot'"),
        ({"epsilon": np.ones(2)}, "epsilon must be a number or a fraction such as 8/255"),
        ({"epsilon": "1e400"}, "epsilon must be a number or a fraction such as 8/255"),
        ({"epsilon": 10**400}, "epsilon must be a number or a fraction such as 8/255"),
        ({"epsilon": "8"}, "did you mean 8/255"),
        ({"epsilon": None}, "epsilon must be a number"),
        ({"norm": "Linf"}, "norm must be linf or l2, got 'Linf'"),
        ({"seed": 1.5}, r"seed must be a whole number, got 1\.5"),
        ({"name": "none"}, "name must be a text, and none is the bare target's, got 'none'"),
        ({"attacks": ["pgd"]}, "attacks must be specs .*, got 'pgd'"),
    ],
)
def test_what_cannot_be_judged_is_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        judged(**given)
    assert "\n" not in str(caught.value)
