"""Weights that somebody made elsewhere: found in whatever they stand under, fitted by name, or refused in one line."""

from __future__ import annotations

import argparse
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import ConfigError, DataConfig, TargetConfig
from dircluster.models.classifiers import WideResNet, build
from dircluster.models.layouts import renamed
from dircluster.models.weight_files import parse
from dircluster.models.weights import load_weights

DATA = DataConfig()


@pytest.fixture(scope="module")
def given() -> Any:
    """A classifier whose weights are given: images are normalized by 0.5 and 0.5."""
    with rng.seeded_torch_rng(0, "given"):
        return build("small_cnn", DATA).eval()


def saved(what: Any, **how: Any) -> bytes:
    file = io.BytesIO()
    torch.save(what, file, **how)
    return file.getvalue()


def taken(blob: bytes, **target: Any) -> tuple[nn.Module, list[str]]:
    """The target that the file's weights were loaded into, and what was said of it."""
    config = TargetConfig(**{"architecture": "small_cnn", **target})
    network = build(config.architecture, DATA, normalization=config.normalization).eval()
    return network, load_weights(network, parse(blob, "w.pt"), config, DATA, "w.pt")


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


WHOLE: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda sd: sd,
    **{name: lambda sd, name=name: {name: sd, "epoch": 3} for name in ("state_dict", "model", "net", "ema", "weights")},
    "nested": lambda sd: {"ema": {"decay": 0.9, "shadow": sd}, "optimizer": {"state": {0: {"m": torch.ones(2, 2)}}}},
    **{
        prefix: lambda sd, prefix=prefix: prefixed(sd, prefix) for prefix in ("module.", "_orig_mod.", "model.", "a.b.")
    },
    "both": lambda sd: {"state_dict": prefixed(sd, "module._orig_mod.")},
    "inside": lambda sd: {name.replace("network.", "network._orig_mod."): value for name, value in sd.items()},
    "averaged": lambda sd: {"n_averaged": torch.tensor(3), **prefixed(sd, "module.")},
    "numpy": lambda sd: {"net": sd, "acc": np.float64(0.9), "epoch": np.int64(3), "curve": np.ones(2)},
    "options": lambda sd: {"net": sd, "args": argparse.Namespace(lr=0.1)},
    "in a list": lambda sd: [{"lr": 0.1}, {"weights": sd}],
    "twice the same": lambda sd: {"model": sd, "ema": {name: value.clone() for name, value in sd.items()}},
    "double": lambda sd: {name: value.double() for name, value in sd.items()},
    "beside tensors": lambda sd: {"state_dict": sd, "confusion": torch.ones(10, 10), "delta": torch.rand(1, 1, 8, 8)},
}


@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_are_found_whatever_they_stand_under(given: Any, form: str, zipped: bool) -> None:
    made, _ = taken(saved(WHOLE[form](given.state_dict()), _use_new_zipfile_serialization=zipped))
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(made(images), given(images))


NORMALIZED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "layer in front": lambda sd: {"0.mean": torch.tensor([0.3]), "0.std": torch.tensor([0.2]), **prefixed(sd, "1.")},
    "its net in parallel": lambda sd: {
        "0.mean": torch.tensor([0.3]),
        "0.std": torch.tensor([0.2]),
        **prefixed(sd, "1.module."),
    },
    "all in parallel": lambda sd: prefixed(
        {"normalize.mean": torch.full((1, 1, 1), 0.3), "normalize.std": torch.tensor(0.2), **prefixed(sd, "model.")},
        "module.",
    ),
    "mu and sigma": lambda sd: {"mu": torch.full((1, 1, 1), 0.3), "sigma": torch.full((1, 1, 1), 0.2), **sd},
    "beside": lambda sd: {"state_dict": sd, "mean": [0.3], "std": (0.2,)},
}


@pytest.mark.parametrize("form", NORMALIZED)
def test_the_normalization_of_a_file_is_taken(given: Any, form: str) -> None:
    made, notes = taken(saved(NORMALIZED[form](given.network.state_dict())))
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(made(images), given.network((images - 0.3) / 0.2))
    assert notes[-1] == "images are normalized by mean 0.3, std 0.2"
    with pytest.raises(ConfigError, match=r"has mean 0.3 and std 0.2 of its own: leave --target.mean and --target.std"):
        taken(saved(NORMALIZED[form](given.network.state_dict())), mean=(0.5,), std=(0.2,))


CONTRADICTIONS: dict[str, Callable[[nn.Module], Any]] = {
    "its own": lambda made: {"net": made.state_dict(), "mean": [0.3], "std": [0.2]},
    "in front": lambda made: {"net": NORMALIZED["mu and sigma"](inner(made)), "mean": [0.5], "std": [0.5]},
    "one inside": lambda made: {"a": {"net": inner(made), "mean": [0.5], "std": [0.5]}, "mean": [0.3], "std": [0.2]},
    "two names": lambda made: {"net": inner(made), "mean": 0.5, "std": 0.5, "image_mean": [0.3], "image_std": [0.2]},
}


def inner(made: Any) -> dict[str, Tensor]:
    """The weights of a classifier without its normalization."""
    found: dict[str, Tensor] = made.network.state_dict()
    return found


@pytest.mark.parametrize("form", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_until_it_is_said_which(given: Any, form: str) -> None:
    blob, images = saved(CONTRADICTIONS[form](given)), torch.rand(3, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"^w.pt says mean 0..(,| )and.*in another place mean.*say which by --target"):
        taken(blob)
    for mean, std in ((0.3, 0.2), (0.5, 0.5)):
        made, _ = taken(blob, mean=(mean,), std=(std,))
        torch.testing.assert_close(made(images), given.network((images - mean) / std))
    with pytest.raises(ConfigError, match=r"of its own: leave --target.mean"):
        taken(blob, mean=(0.4,), std=(0.2,))


def test_one_normalization_in_two_places_is_taken(given: Any) -> None:
    made, _ = taken(saved({"net": given.state_dict(), "mean": [0.5, 0.5, 0.5], "std": [0.5]}), mean=(0.5,), std=(0.5,))
    assert torch.equal(made.state_dict()["mean"], given.mean)
    taken(saved({"net": given.state_dict(), "mean": [0.5], "std": 0.5}))


def test_a_normalization_is_given_or_asked_for_and_never_guessed(given: Any) -> None:
    bare, images = saved(given.network.state_dict()), torch.rand(3, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"does not say how images are normalized: give .* --target.mean M"):
        taken(bare)
    made, _ = taken(bare, mean=(0.0,), std=(1.0,))
    assert torch.equal(made(images), given.network(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda sd: sd | {"mean": torch.tensor([125.0]), "std": torch.tensor([60.0])},
            r"mean 125, not one of images in",
        ),
        (
            lambda sd: sd | {"mean": torch.tensor([0.5]), "std": torch.tensor([0.0])},
            r"std of 0: it must be at least 1e-05",
        ),
        (
            lambda sd: sd | {"mean": torch.tensor([0.5]), "std": torch.tensor([float("nan")])},
            r"a std of nan: it must be at least",
        ),
        (lambda sd: sd | {"mean": torch.tensor([0.5]), "std": torch.tensor([1e-12])}, r"a std of 1e-12: it must be"),
        (lambda sd: sd | {"mean": torch.tensor([0.0]), "std": torch.tensor([255.0])}, r"std 255, not one of images in"),
        (
            lambda sd: sd | {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.5)},
            r"3 channels, but data.channels",
        ),
        (lambda sd: sd | {"0.weight": sd["0.weight"] * float("nan")}, r"not finite .* in '0.weight'"),
        (lambda sd: sd | {"0.bias": sd["0.bias"] + float("inf")}, r"not finite .* in '0.bias'"),
        (lambda sd: sd | {"2.weight": sd["2.weight"] * 0}, r"nothing but zeros in '2.weight'"),
        (lambda sd: {k: v.to(torch.int8) for k, v in sd.items()}, r"is torch.int8.*quantized and sparse"),
        (lambda sd: {k: v.to("meta") for k, v in sd.items()}, r"holds '0.weight' on the meta device, without values"),
        (lambda sd: {"model": sd, "ema": {k: v + 1 for k, v in sd.items()}}, r"several sets of weights \(model, ema\)"),
        (lambda sd: {"optimizer": {"state": {}}, "epoch": 3}, r"holds no weights \(tensors by name\): save them by"),
        (lambda sd: torch.zeros(3), r"holds no weights"),
        (
            lambda sd: nn.Sequential(nn.Linear(2, 2)),
            r"a pickled object \(torch.nn.modules.container.Sequential\).*save",
        ),
        (lambda sd: {"model": nn.Linear(2, 2)}, r"a pickled object \(torch.nn.modules.linear.Linear\)"),
        (lambda sd: {k: v for k, v in sd.items() if k != "5.bias"}, r"does not fit the model: '5.bias' is missing"),
        (lambda sd: sd | {"9.bias": torch.zeros(3)}, r"'9.bias' is unknown"),
        (lambda sd: sd | {"queue": torch.zeros(3, 3)}, r"the model: 'queue' is unknown$"),
        (
            lambda sd: sd | {"mean": torch.tensor([float("nan")]), "std": torch.tensor([0.5])},
            r"has mean nan, not one of images in \[0, 1\]",
        ),
        (lambda sd: sd | {"7.bias": torch.zeros(3)}, r"'7.bias' is \(3,\), not \(10,\); check data.classes"),
    ],
)
def test_what_cannot_be_taken_is_one_line(given: Any, change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        taken(saved(change(dict(given.network.state_dict()))), mean=(0.5,), std=(0.5,))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("blob", [b"", b"PK\x03\x04", b"\x80\x02", b"hello", saved({"a": torch.ones(9, 9)})[:-80]])
def test_damaged_files_are_one_line(blob: bytes) -> None:
    with pytest.raises(ConfigError, match=r"w.pt is not a sound") as refusal:
        parse(blob, "w.pt")
    assert "\n" not in str(refusal.value)


def flipped(blob: bytes, tensor: Tensor) -> bytes:
    """A saved file with one bit of ``tensor`` the other way round: an exponent's."""
    changed = bytearray(blob)
    changed[blob.index(tensor.numpy().tobytes()) + 3] ^= 0x40
    return bytes(changed)


def test_a_flipped_bit_is_never_taken(given: Any) -> None:
    sound = saved(given.state_dict())
    with pytest.raises(ConfigError, match=r"^w.pt is not a sound file of weights: record 'archive/data/\d' is damaged"):
        taken(flipped(sound, given.network[5].weight.detach()))
    with pytest.raises(ConfigError, match="its table of records is damaged"):
        taken(sound.replace(b"PK\x01\x02", b"PK\x01\x03"))


def test_files_without_checksums_are_taken(given: Any) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        bare = saved(given.state_dict())
    finally:
        torch.serialization.set_crc32_options(True)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(taken(bare)[0](images), given(images))


def test_weights_that_hold_themselves_are_one_line() -> None:
    found: list[Any] = []
    found.append(found)
    with pytest.raises(ConfigError, match=r"^w.pt holds weights too deep in itself: save them alone by torch.save"):
        taken(saved(found))


def test_one_of_several_sets_is_chosen_by_name(given: Any) -> None:
    two = saved({"model": given.state_dict(), "ema": {k: v * 0.5 for k, v in given.state_dict().items()}})
    made, notes = taken(two, entry="model")
    assert torch.equal(made.state_dict()["network.0.weight"], given.network[0].weight)
    assert notes[0] == "its weights are those of entry 'model'"
    with pytest.raises(ConfigError, match=r"holds no weights under --target.entry net; there are: model, ema"):
        taken(two, entry="net")


def lightning(made: Any) -> dict[str, Any]:
    """What a module that trains ``made`` beside a teacher and a running mean of it saves."""
    own, half = made.state_dict(), {name: value * 0.5 for name, value in made.network.state_dict().items()}
    parts = prefixed(own, "model.") | prefixed(half, "teacher.net.") | {"loss.weight": torch.ones(10)}
    averaged = prefixed(own, "ema.module.") | {"ema.n_averaged": torch.tensor(3)}
    return {"state_dict": parts | averaged, "epoch": 3}


def test_a_part_of_what_was_saved_is_taken_only_by_name(given: Any) -> None:
    blob, images = saved(lightning(given)), torch.rand(3, 1, 8, 8)
    choice = "name that by --target.entry state_dict.model or state_dict.teacher or state_dict.ema"
    with pytest.raises(ConfigError, match=f"does not fit the model: .* is missing; if a part .*{choice}$"):
        taken(blob)
    for part in ("model", "ema"):
        assert torch.equal(taken(blob, entry=f"state_dict.{part}")[0](images), given(images))
    with pytest.raises(ConfigError, match="does not say how images are normalized"):
        taken(blob, entry="state_dict.teacher")
    made, notes = taken(blob, entry="state_dict.teacher", mean=(0.3,), std=(0.2,))
    assert torch.equal(made.network[0].weight, given.network[0].weight * 0.5)
    assert notes[0] == "its weights are those of entry 'state_dict.teacher'"


def test_the_normalization_beside_a_part_is_its_own(given: Any) -> None:
    front = {"normalize.mean": torch.tensor([0.3]), "normalize.std": torch.tensor([0.2]), "loss.weight": torch.ones(10)}
    made, _ = taken(saved({**front, **prefixed(inner(given), "net.")}), entry="net")
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(made(images), given.network((images - 0.3) / 0.2))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_network_in_a_wrapper_takes_weights_with_and_without_it(given: Any, wrap: Any, prefix: str) -> None:
    made, target = wrap(build("small_cnn", DATA)), TargetConfig(architecture="my_package:wrapped")
    load_weights(made, parse(saved(prefixed(given.state_dict(), prefix)), "w.pt"), target, DATA, "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), given.parameters(), strict=True))


def test_a_factory_without_a_place_for_a_mean_says_how_to_put_it_in_front(
    given: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare_target.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    blob = saved({"0.mean": torch.tensor([0.3]), "0.std": torch.tensor([0.2]), **prefixed(inner.state_dict(), "1.")})
    with pytest.raises(ConfigError, match=r"put them in front by --target.mean 0.3 --target.std 0.2"):
        taken(blob, architecture="bare_target:make")
    made, _ = taken(blob, architecture="bare_target:make", mean=(0.3,), std=(0.2,))
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(made(images), inner((images - 0.3) / 0.2))
    alone = saved(inner.state_dict())
    assert taken(alone, architecture="bare_target:make")[1][-1].startswith("bare_target:make is taken to normalize")


# The layouts of RobustBench, TRADES and torchvision, written down as networks of their own.


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.called = shortcut
        both = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.add_module(shortcut, both if stride > 1 or inputs != outputs else nn.Sequential())

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inner + self.get_submodule(self.called)(x)).relu()


class PreActivated(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, raw: bool, wide: bool = False) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.raw, self.called = raw, ""
        if stride > 1 or inputs != outputs:
            self.called, one = "convShortcut" if wide else "shortcut", nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.add_module(self.called, one if wide else nn.Sequential(one))

    def forward(self, x: Tensor) -> Tensor:
        active = self.bn1(x).relu()
        inner: Tensor = self.conv2(self.bn2(self.conv1(active)).relu())
        return inner + (self.get_submodule(self.called)(x if self.raw else active) if self.called else x)


class Theirs(nn.Module):
    """Parts run in order, the last behind a global average."""

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = [part for name, part in self.named_children() if not name.startswith("sub_")]
        for part in parts:
            x = part(x).relu() if isinstance(part, nn.BatchNorm2d) else part(x)
        logits: Tensor = last(x.mean((2, 3)))
        return logits


def resnet18(shortcut: str = "shortcut", last: str = "linear") -> nn.Module:
    made, inputs = Theirs(), 64
    made.conv1, made.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
    for number, outputs in enumerate((64, 128, 256, 512), 1):
        blocks = Basic(inputs, outputs, min(number, 2), shortcut), Basic(outputs, outputs, 1, shortcut)
        made.add_module(f"layer{number}", nn.Sequential(*blocks))
        inputs = outputs
    made.add_module(last, nn.Linear(512, 10))
    return made


def preactresnet18(raw: bool, normalized: bool) -> nn.Module:
    made, inputs = Theirs(), 64
    made.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    for number, outputs in enumerate((64, 128, 256, 512), 1):
        blocks = PreActivated(inputs, outputs, min(number, 2), raw), PreActivated(outputs, outputs, 1, raw)
        made.add_module(f"layer{number}", nn.Sequential(*blocks))
        inputs = outputs
    if normalized:
        made.bn = nn.BatchNorm2d(512)
    made.linear = nn.Linear(512, 10)
    return made


def wide_resnet(depth: int, widen: int, unused_copy: bool) -> nn.Module:
    made, inputs, blocks = Theirs(), 16, (depth - 4) // 6
    made.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)

    def stage(outputs: int, stride: int) -> nn.Module:
        first = PreActivated(inputs, outputs, stride, False, wide=True)
        rest = (PreActivated(outputs, outputs, 1, False, wide=True) for _ in range(blocks - 1))
        return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))

    for number, outputs in enumerate((16 * widen, 32 * widen, 64 * widen), 1):
        made.add_module(f"block{number}", stage(outputs, min(number, 2)))
        if number == 1 and unused_copy:
            made.add_module("sub_block1", stage(outputs, 1))
        inputs = outputs
    made.bn1, made.fc = nn.BatchNorm2d(64 * widen), nn.Linear(64 * widen, 10)
    return made


def settled(network: nn.Module) -> nn.Module:
    """With statistics as after a training, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in network.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return network.eval()


COLOR = DataConfig(name="cifar10", height=8, width=8, channels=3)
AS_THEY_ARE = {"mean": (0.0,), "std": (1.0,)}


@pytest.mark.parametrize(
    ("architecture", "make"),
    [
        ("resnet18", resnet18),
        ("resnet18", lambda: resnet18("downsample", "fc")),
        ("preactresnet18", lambda: preactresnet18(False, True)),
        ("preactresnet18-raw", lambda: preactresnet18(True, True)),
        ("preactresnet18-nobn", lambda: preactresnet18(False, False)),
        ("preactresnet18-raw-nobn", lambda: preactresnet18(True, False)),
    ],
)
def test_layouts_of_others_give_the_same_logits(architecture: str, make: Callable[[], nn.Module]) -> None:
    theirs, images = settled(make()), torch.rand(2, 3, 8, 8)
    config = TargetConfig(architecture=architecture, **AS_THEY_ARE)  # type: ignore[arg-type]
    ours = build(architecture, COLOR, normalization=config.normalization).eval()
    notes = load_weights(ours, {"net": prefixed(theirs.state_dict(), "module.")}, config, COLOR, "w.pt")
    torch.testing.assert_close(ours(images), theirs(images))
    assert "the names do not say whether" in notes[1]


@pytest.mark.parametrize("depth", [28, 34])
@pytest.mark.parametrize("unused_copy", [True, False])
def test_the_layout_of_wide_resnets(depth: int, unused_copy: bool) -> None:
    theirs, images = settled(wide_resnet(depth, 1, unused_copy)), torch.rand(2, 3, 8, 8)
    ours = WideResNet(depth, 1, 10, 3).eval()  # names do not depend on the width
    found = renamed(theirs.state_dict(), f"wrn-{depth}-10")
    assert found is not None
    ours.load_state_dict({found[name]: value for name, value in theirs.state_dict().items() if name in found})
    torch.testing.assert_close(ours(images), theirs(images))


def test_weights_of_another_architecture_name_it() -> None:
    with torch.device("meta"):
        ours, theirs = build("resnet18", COLOR), preactresnet18(False, True)
    config = TargetConfig(architecture="resnet18", **AS_THEY_ARE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"does not fit resnet18: it fits --target.architecture preactresnet18$"):
        load_weights(ours, theirs.state_dict(), config, COLOR, "w.pt")
