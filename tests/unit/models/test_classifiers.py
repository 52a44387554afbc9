"""Targets: the field's networks, timm's, and the user's own."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from dircluster import config
from dircluster.config import ConfigError, DataConfig
from dircluster.models import elsewhere
from dircluster.models.classifiers import (
    ARCHITECTURES,
    Normalized,
    PreActBlock,
    build,
    check_classes,
    check_usable,
    last_map,
)

COLOR = DataConfig(name="cifar10", height=32, width=32, channels=3)


@pytest.mark.parametrize("architecture", ["resnet18", "small_cnn", "timm:resnet10t", "preactresnet18", "wrn-10-2"])
def test_logits(architecture: str) -> None:
    network = build(architecture, COLOR).eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    check_classes(network, COLOR)


def test_resnet18_has_the_published_size() -> None:
    assert sum(p.numel() for p in build("resnet18", COLOR).parameters()) == 11_173_962  # METHOD: 11.17 M


# Parameters at 3 channels and 10 classes, by hand. 3x3 convolutions have 9ab, shortcuts ab, normalizations 2a.
# A block that keeps a channels has 2 normalizations and 2 convolutions, 4a + 18aa; one from a to b has
# 2a + 9ab + 2b + 9bb + ab. Both networks end in a normalization and a linear layer with biases.
#
# PreActResNet-18: stem 27*64 = 1,728; 64: 2 * 73,984 = 147,968; 64 to 128: 229,760 + 295,424 = 525,184; to 256:
# 918,272 + 1,180,672 = 2,098,944; to 512: 3,671,552 + 4,720,640 = 8,392,192; end 2*512 + 5,130 = 6,154.
#
# WideResNet: stem 27*16 = 432; 16 to 160: 256,352, then 461,440 a block; to 320: 1,434,560, then 1,844,480; to 640:
# 5,736,320, then 7,375,360; end 2*640 + 6,410 = 7,690. WRN-28 has 3 blocks after the first of a stage, WRN-34 has 4.
# WRN-10-2 has none: 432; 16 to 32: 14,432; to 64: 57,536; to 128: 229,760; end 2*128 + 1,290 = 1,546.
# Another WRN-28-10 of the literature (the classifier of EBM defenses) has a bias in every convolution as well:
# 16 + 9 * (160 + 320 + 640) = 10,096 more, 36,489,290 in all.
@pytest.mark.parametrize(
    ("architecture", "parameters", "gmac"),
    [
        ("preactresnet18", 11_172_170, 0.56),
        ("wrn-10-2", 303_706, 0.04),
        ("wrn-28-10", 36_479_194, 5.24),
        ("wrn-34-10", 46_160_474, 6.66),
    ],
)
def test_pre_activation_networks_have_the_published_sizes(architecture: str, parameters: int, gmac: float) -> None:
    with torch.device("meta"):
        network = build(architecture, COLOR).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e9, 2) == gmac


@pytest.mark.parametrize("architecture", ["resnet18", "preactresnet18", "wrn-10-2"])
@pytest.mark.parametrize(("channels", "height", "width", "classes"), [(1, 8, 8, 10), (1, 28, 28, 4), (3, 17, 9, 100)])
def test_networks_with_global_pooling_take_any_images(
    architecture: str, channels: int, height: int, width: int, classes: int
) -> None:
    data = DataConfig(height=height, width=width, channels=channels, classes=classes)
    network = build(architecture, data)
    check_classes(network, data)
    assert network.train()(torch.rand(2, channels, height, width)).shape == (2, classes)


def test_a_pre_activation_block() -> None:
    torch.manual_seed(0)
    block, x = PreActBlock(4, 6, 2).eval().double(), torch.randn(2, 4, 8, 8).double()
    active = F.relu(x / (1 + 1e-5) ** 0.5)
    inner = F.relu(F.conv2d(active, block.conv1.weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5)
    assert isinstance(block.shortcut, nn.Conv2d)
    shortcut = F.conv2d(active, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), F.conv2d(inner, block.conv2.weight, padding=1) + shortcut)
    same = PreActBlock(4, 4, 1)
    nn.init.zeros_(same.conv2.weight)
    assert torch.equal(same(x.float()), x.float())


def test_the_config_knows_every_architecture() -> None:
    assert tuple(ARCHITECTURES) == config.ARCHITECTURES
    for name in ARCHITECTURES:
        config.TargetConfig(architecture=name)
    with pytest.raises(ConfigError, match=r"must be small_cnn, .*, wrn-34-10, timm:NAME or .*, got 'WideResNet-28-10'"):
        config.TargetConfig(architecture="WideResNet-28-10")


def test_images_are_normalized_inside() -> None:
    network = build("small_cnn", DataConfig()).eval()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(network(images), network.network((images - 0.5) / 0.5))


def test_a_users_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_target.py").write_text(
        "from torch import nn\n"
        "def make(classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, classes))\n"
        "def wrong(classes, channels):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build("my_target:make", DataConfig())(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ConfigError, match=r"must return a torch.nn.Module, got int"):
        build("my_target:wrong", DataConfig())
    with pytest.raises(ConfigError, match="cannot be imported"):
        build("my_target:absent", DataConfig())
    with pytest.raises(ConfigError, match="cannot be imported"):
        build("no_such_module:make", DataConfig())
    sys.modules.pop("my_target", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def (:", "cannot be imported: SyntaxError: invalid syntax"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("def make(): raise SystemExit(3)", "raised SystemExit: 3"),
        ("make = 5", "raised TypeError"),
        ("from torch import nn; make = nn.Linear(2, 2)", "is a network: name the function or class that makes it"),
        (
            "from torch import nn; make = lambda: nn.Linear(64, 10).to('meta')",
            "makes a network that lies on the meta device, where nothing is computed",
        ),
        (
            "from torch import nn; make = lambda: nn.Sequential(nn.Flatten(0), nn.MaxPool3d(2), nn.LazyLinear(9))",
            "makes a network that has weights without a size",
        ),
        (
            "from torch import nn\nclass make(nn.Linear):\n    def __init__(self): super().__init__(2, 2)\n"
            "    def get_extra_state(self): return {}\n",
            "makes a network that keeps '_extra_state', which is no dense tensor of numbers",
        ),
    ],
)
def test_code_that_fails_is_told_in_a_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_target.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"^target.architecture 'failing_target:make' {message}.*$"):
        build("failing_target:make", DataConfig())
    sys.modules.pop("failing_target", None)


DEFAULTS = """
import torch
from torch import nn
torch.set_default_dtype(torch.float64)
def make():
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10, device="cpu", dtype=torch.float32))
"""


def test_pytorchs_defaults_are_those_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "changing_target.py").write_text(DEFAULTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = build("changing_target:make", DataConfig())
    assert (torch.get_default_dtype(), torch.get_default_device()) == (torch.float32, torch.device("cpu"))
    assert torch.is_grad_enabled()
    check_usable(made, DataConfig())
    sys.modules.pop("changing_target", None)


FACTORIES = """
from torch import nn
class ByKeyword(nn.Sequential):
    def __init__(self, num_classes, in_chans):
        super().__init__(nn.Flatten(), nn.Linear(in_chans * 64, num_classes))
def in_channels(n_classes=3, in_channels=3): return ByKeyword(n_classes, in_channels)
def nothing(): return ByKeyword(10, 1)
def any_name(**how): return ByKeyword(**how)
def any_other(**how): return in_channels(**how)
def classes_alone(num_classes=1000, weights=None): return ByKeyword(num_classes, 1)
class Place:
    make = ByKeyword
"""


@pytest.mark.parametrize(
    "name", ["ByKeyword", "in_channels", "nothing", "any_name", "any_other", "classes_alone", "Place.make"]
)
def test_factories_are_called_by_the_names_that_they_take(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = build(f"factories:{name}", DataConfig())
    check_classes(made, DataConfig())
    normalized = build(f"factories:{name}", DataConfig(), normalization=((0.3,), (0.2,)))
    assert isinstance(normalized, Normalized)
    sys.modules.pop("factories", None)


def test_torchvisions_networks_are_targets() -> None:
    with torch.device("meta"):
        network = build(
            "torchvision.models:resnet18", COLOR, normalization=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        check_classes(network, COLOR)
        with pytest.raises(ConfigError, match="the target cannot take 1x8x8 images"):
            check_classes(build("torchvision.models:resnet18", DataConfig()), DataConfig())


def test_published_weights_without_a_network_are_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(elsewhere, "answers", lambda url: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked: list[str] = []

    def nowhere(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "no name can be looked up")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(ConfigError, match=r"^timm:resnet18 could not be made: huggingface.co does not answer and"):
        build("timm:resnet18", COLOR, pretrained=True)
    assert asked == []  # at once: each name would be asked for several times, with pauses


def test_whether_a_server_answers() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        assert not elsewhere.answers(f"http://127.0.0.1:{port}")  # nobody listens
        listening.listen()
        began = time.monotonic()
        assert not elsewhere.answers(f"http://127.0.0.1:{port}")  # somebody does, and says nothing
        assert time.monotonic() - began < elsewhere.PATIENCE + 30


def test_an_unknown_timm_model_is_named() -> None:
    with pytest.raises(ConfigError, match="timm has no model 'resnet999'"):
        build("timm:resnet999", COLOR)


@pytest.mark.parametrize("architecture", ["resnet18", "small_cnn", "timm:resnet10t", "preactresnet18", "wrn-10-2"])
def test_a_target_is_checked_on_the_device_that_it_lies_on(architecture: str) -> None:
    check_classes(build(architecture, COLOR).to("meta"), COLOR)  # a CPU image would not meet these weights


def test_a_wrong_class_count_is_found() -> None:
    with pytest.raises(ConfigError, match=r"gives 10 classes, but data.classes is 7"):
        check_classes(build("small_cnn", DataConfig()), DataConfig(classes=7))


def test_a_target_of_other_images_is_found() -> None:
    with pytest.raises(ConfigError, match="cannot take 1x8x8 images"):
        check_classes(build("resnet18", COLOR), DataConfig())


class After(nn.Module):
    """A small network for digits and what is done to its logits (N, 10)."""

    def __init__(self, change: Callable[[torch.Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.network, self.change = build("small_cnn", DataConfig()), change

    def forward(self, images: torch.Tensor) -> Any:
        return self.change(self.network(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.softmax(1), "the target returns probabilities; it must return logits"),
        (lambda z: z.mean(0, keepdim=True), r"must return logits \(2, classes\) for 2 images, got \(1, 10\)"),
        (lambda z: z.reshape(1, 10), "cannot take 1x8x8 images 2 at once: shape"),
        (lambda z: (z * 100).long(), "must return logits as floats, got torch.int64"),
        (lambda z: z + 0j, "must return logits as floats, got torch.complex64"),
        (lambda z: (z, z), r"must return logits \(1, classes\) for 1 image, got tuple"),
    ],
)
def test_what_answers_otherwise_is_no_target(change: Callable[[torch.Tensor], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        check_classes(After(change), DataConfig())
    assert "\n" not in str(refusal.value)


def in_bytes() -> nn.Module:
    """Reads images as bytes, as what was made for cameras does."""
    made = After()
    made.network.normalize = lambda images: (images * 255).byte().float() / 255
    return made


def exported() -> nn.Module:
    """What torch.export makes for any number of images."""
    sizes = ({0: torch.export.Dim("images")},)
    return torch.export.export(After().eval().network, (torch.rand(3, 1, 8, 8),), dynamic_shapes=sizes).module()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: After(lambda z: z.detach()), "differentiated by its images, as attacks do: element 0"),
        (in_bytes, "differentiated by its images, as attacks do: The diff"),
        (exported, "brought into train mode: Calling train"),
    ],
)
def test_a_stage_works_with_what_can_be_differentiated_and_trained(make: Any, message: str) -> None:
    made = make()
    check_classes(made, DataConfig())
    with pytest.raises(ConfigError, match=f"^the target cannot be {message}") as refusal:
        check_usable(made, DataConfig())
    assert "\n" not in str(refusal.value)


def test_a_check_draws_from_no_stream_of_the_run() -> None:
    noisy, before = After(lambda z: z + torch.randn_like(z)), torch.get_rng_state()
    check_classes(noisy, DataConfig())
    check_usable(noisy, DataConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_check_leaves_every_part_in_its_mode() -> None:
    classifier = build("resnet18", DataConfig(channels=3, height=8, width=8)).train()
    frozen_part = next(part for part in classifier.modules() if isinstance(part, torch.nn.BatchNorm2d))
    frozen_part.eval()
    modes = [part.training for part in classifier.modules()]
    check_classes(classifier, DataConfig(channels=3, height=8, width=8))
    check_usable(classifier, DataConfig(channels=3, height=8, width=8))
    assert [part.training for part in classifier.modules()] == modes


@pytest.mark.parametrize(
    ("architecture", "channels", "side"),
    [("resnet18", 512, 4), ("small_cnn", 64, 16), ("preactresnet18", 512, 4), ("wrn-10-2", 128, 8)],
)
def test_the_last_map_is_what_is_pooled_or_flattened(architecture: str, channels: int, side: int) -> None:
    classifier, images = build(architecture, COLOR).eval(), torch.rand(2, 3, 32, 32)
    assert isinstance(classifier, Normalized)
    assert isinstance(classifier.network, nn.Sequential)
    found = last_map(classifier)(images)
    assert found.shape == (2, channels, side, side)
    after = list(classifier.network)
    while not isinstance(after[0], nn.AdaptiveAvgPool2d | nn.Flatten):
        after.pop(0)
    torch.testing.assert_close(nn.Sequential(*after)(found), classifier(images))


def test_the_last_map_of_a_timm_model_is_its_own() -> None:
    classifier, images = build("timm:resnet10t", COLOR).eval(), torch.rand(2, 3, 32, 32)
    assert isinstance(classifier, Normalized)
    network: Any = classifier.network
    torch.testing.assert_close(network.forward_head(last_map(classifier)(images)), classifier(images))


@pytest.mark.parametrize("target", [nn.Linear(4, 2), nn.Sequential(nn.Conv2d(3, 2, 1))])
def test_a_target_without_a_last_map_is_refused(target: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"the target \((Linear|Sequential)\) does not say"):
        last_map(target)
