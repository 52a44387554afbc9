"""Targets h: classifiers that take images in [0, 1], normalize inside themselves and return logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.config import ConfigError, DataConfig, first_line
from dircluster.models.elsewhere import Normalization, factory_network, timm_network
from dircluster.models.modules import begin, device_of, evaluating
from dircluster.models.precision import WholeConv2d, WholeLinear
from dircluster.rng import put_back


class Normalized(nn.Module):
    """A classifier behind per-channel normalization: (N, C, H, W) in [0, 1] -> (N, classes) logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the network takes them, both (N, C, H, W)."""
        if images.shape[1] != self.mean.shape[1]:  # broadcasting would make color of gray
            raise ValueError(f"expected {self.mean.shape[1]} channels, got {images.shape[1]}")
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalize(images))
        return logits


class SmallCNN(nn.Sequential):
    """Two strided convolutions and two linear layers, for 8x8 digits: no batch statistics, 0.1 M parameters."""

    def __init__(self, classes: int, channels: int, height: int, width: int) -> None:
        super().__init__(
            WholeConv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * ((height + 1) // 2) * ((width + 1) // 2), 64),
            nn.ReLU(),
            WholeLinear(64, classes),
        )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet18(nn.Sequential):
    """The CIFAR ResNet-18: 3x3 stem, no stem pooling, 11.17 M parameters."""

    def __init__(self, classes: int, channels: int) -> None:
        blocks: list[nn.Module] = []
        inputs = 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        super().__init__(
            WholeConv2d(channels, 64, 3, 1, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            WholeLinear(512, classes),
        )


class PreActBlock(nn.Module):
    """Batch normalization and ReLU before each of two 3x3 convolutions (He et al. 2016, Identity Mappings).

    Where size or channels change, the shortcut is a 1x1 convolution of the activated input, or of the ``raw`` one.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, ceil(H/stride), ceil(W/stride))."""
        active = F.relu(self.bn1(x))
        inner: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(x if self.raw else active))

    def extra_repr(self) -> str:
        return "raw" if self.raw else ""


class PreActResNet(nn.Sequential):
    """A 3x3 stem, stages of pre-activation blocks, normalization and ReLU, global average pooling, a linear layer.

    Stage i has ``depth`` blocks of ``widths[i]`` channels, and every stage but the first halves the sides. Weights of
    convolutions start at N(0, 2 / (outputs * kernel area)), as in the code of TRADES.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        stem: int,
        widths: tuple[int, ...],
        depth: int,
        *,
        raw: bool = False,
        normalized: bool = True,
    ) -> None:
        """``raw``: of blocks; without ``normalized``, the last blocks are pooled as they are."""
        blocks: list[nn.Module] = []
        inputs = stem
        for number, outputs in enumerate(widths):
            for index in range(depth):
                blocks.append(PreActBlock(inputs, outputs, 2 if number > 0 and index == 0 else 1, raw))
                inputs = outputs
        super().__init__(
            WholeConv2d(channels, stem, 3, 1, 1, bias=False),
            *blocks,
            *((nn.BatchNorm2d(inputs), nn.ReLU()) if normalized else ()),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            WholeLinear(inputs, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                begin(nn.init.kaiming_normal_, module.weight, mode="fan_out", nonlinearity="relu")


class PreActResNet18(PreActResNet):
    """The CIFAR PreActResNet-18 with normalization before the linear layer (Rice et al. 2020): 11.17 M parameters.

    RobustBench has it with ``raw`` shortcuts and without normalization at the end as well.
    """

    def __init__(self, classes: int, channels: int, raw: bool = False, normalized: bool = True) -> None:
        super().__init__(classes, channels, 64, (64, 128, 256, 512), 2, raw=raw, normalized=normalized)


class WideResNet(PreActResNet):
    """WideResNet-``depth``-``widen`` (Zagoruyko and Komodakis 2016) as TRADES and RobustBench have it, no dropout.

    The code of TRADES also holds an unused copy of the first stage (``sub_block1``), which is left out here.
    """

    def __init__(self, depth: int, widen: int, classes: int, channels: int) -> None:
        super().__init__(classes, channels, 16, (16 * widen, 32 * widen, 64 * widen), (depth - 4) // 6)


ARCHITECTURES: dict[str, Callable[[DataConfig], nn.Module]] = {
    "small_cnn": lambda data: SmallCNN(data.classes, data.channels, data.height, data.width),
    "resnet18": lambda data: ResNet18(data.classes, data.channels),
    "preactresnet18": lambda data: PreActResNet18(data.classes, data.channels),
    "preactresnet18-raw": lambda data: PreActResNet18(data.classes, data.channels, raw=True),
    "preactresnet18-nobn": lambda data: PreActResNet18(data.classes, data.channels, normalized=False),
    "preactresnet18-raw-nobn": lambda data: PreActResNet18(data.classes, data.channels, raw=True, normalized=False),
    "wrn-10-2": lambda data: WideResNet(10, 2, data.classes, data.channels),
    "wrn-28-10": lambda data: WideResNet(28, 10, data.classes, data.channels),
    "wrn-34-10": lambda data: WideResNet(34, 10, data.classes, data.channels),
}
"""Networks by name, as functions of the data; their input is normalized to [-1, 1]. Names are config.ARCHITECTURES."""


def build(
    architecture: str, data: DataConfig, *, pretrained: bool = False, normalization: Normalization | None = None
) -> nn.Module:
    """A classifier for ``data``: (N, C, H, W) in [0, 1] -> (N, classes) logits.

    ``architecture`` is one of ARCHITECTURES, timm:NAME, or package.module:factory. ``pretrained`` fetches timm's
    published weights with their own head. ``normalization`` is put in front of the network instead of its own, which a
    factory's is not known to have. Raises ConfigError when it cannot be made.
    """
    own: Normalization = (0.5,), (0.5,)
    if architecture in ARCHITECTURES:
        network = ARCHITECTURES[architecture](data)
    elif architecture.startswith("timm:"):
        name, classes = architecture[len("timm:") :], None if pretrained else data.classes
        network, own = timm_network(name, classes, data.channels, pretrained)
    else:
        network = factory_network(architecture, data)
        if normalization is None:
            return network
    mean, std = ((*values, *values[-1:] * (data.channels - len(values))) for values in normalization or own)
    return Normalized(network, mean, std)


def last_map(classifier: nn.Module) -> Callable[[Tensor], Tensor]:
    """The last feature map of ``classifier`` before pooling or flattening, as a function of images.

    (N, C, H, W) in [0, 1] -> (N, features, h, w), by the weights of ``classifier``; whatever ``forward_features`` gives
    for timm's networks. Raises ConfigError where the network does not say which map that is.
    """
    network = _bare(classifier)
    through: Callable[[Tensor], Tensor] | None = getattr(network, "forward_features", None)
    if through is None and isinstance(network, nn.Sequential):
        maps = _maps(network)
        through = nn.Sequential(*maps) if len(maps) < len(network) else None
    if through is None:
        raise ConfigError(
            f"the target ({type(network).__name__}) does not say what its last feature map is: it is no nn.Sequential"
            " with a pooling or Flatten, and has no forward_features"
        )
    return _of_images(classifier, through)


def half_map(classifier: nn.Module) -> Callable[[Tensor], Tensor]:
    """The last feature map before a second halving: (N, C, H, W) -> (N, features, H/2, W/2).

    Of a ResNet-18 that is layer2, (128, 16, 16) of 32x32 pixels. A part of the network with layers of stride 2 is taken
    to halve once, and other strides are not counted. Raises ConfigError where the network is no nn.Sequential.
    """
    network = _bare(classifier)
    if not isinstance(network, nn.Sequential):
        raise ConfigError(
            f"the target ({type(network).__name__}) does not say what its maps of half size are: it is no nn.Sequential"
        )
    kept: list[nn.Module] = []
    halved = 0
    for part in _maps(network):
        halved += any(getattr(layer, "stride", None) in (2, (2, 2)) for layer in part.modules())
        if halved > 1:
            break
        kept.append(part)
    return _of_images(classifier, nn.Sequential(*kept))


def pooled(classifier: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the last linear layer of ``classifier`` is given, as a function of images: (N, C, H, W) -> (N, features).

    Raises ConfigError where the network does not say which vector that is.
    """
    network: Any = _bare(classifier)
    if isinstance(network, nn.Sequential) and isinstance(network[-1], nn.Linear):
        return _of_images(classifier, nn.Sequential(*list(network)[:-1]))
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        return _of_images(classifier, lambda x: network.forward_head(network.forward_features(x), pre_logits=True))
    raise ConfigError(
        f"the target ({type(network).__name__}) does not say what its last linear layer is given: it is no"
        " nn.Sequential that ends with one, and has no forward_features and forward_head"
    )


def _bare(classifier: nn.Module) -> nn.Module:
    """The network without the normalization in front of it."""
    return classifier.network if isinstance(classifier, Normalized) else classifier


def _maps(network: nn.Sequential) -> list[nn.Module]:
    """Parts before the first pooling or flattening."""
    ends = [i for i, part in enumerate(network) if isinstance(part, nn.AdaptiveAvgPool2d | nn.Flatten)]
    return list(network)[: ends[0]] if ends else list(network)


def _of_images(classifier: nn.Module, features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``features`` of what the network is given, as a function of images in [0, 1]."""

    def mapped(images: Tensor) -> Tensor:
        return features(classifier.normalize(images) if isinstance(classifier, Normalized) else images)

    return mapped


def check_classes(classifier: nn.Module, data: DataConfig) -> None:
    """Raise ConfigError unless ``classifier`` gives logits, (N, data.classes), for N images of ``data``."""
    images = _noise(data, 2).to(device_of(classifier))
    with evaluating(classifier), put_back(), torch.no_grad():
        for some in (images[:1], images):
            logits = _logits(classifier, some, data)
    if not logits.is_meta and are_probabilities(logits):
        raise ConfigError("the target returns probabilities; it must return logits (what comes before the softmax)")


def check_usable(classifier: nn.Module, data: DataConfig) -> None:
    """Raise ConfigError unless a stage can work with ``classifier``: attacks differentiate its logits by the images of
    ``data``, and recipes bring it into train and eval mode.
    """
    images = _noise(data, 2).to(device_of(classifier)).requires_grad_()
    with evaluating(classifier), put_back(), torch.enable_grad():
        try:
            torch.autograd.grad(classifier(images).sum(), images)
        except Exception as error:  # somebody's own operations may raise anything
            raise ConfigError(
                f"the target cannot be differentiated by its images, as attacks do: {first_line(error)}"
            ) from error
        try:
            classifier.train()
        except Exception as error:  # as what torch.export made does
            raise ConfigError(f"the target cannot be brought into train mode: {first_line(error)}") from error


def draws(classifier: nn.Module, data: DataConfig) -> bool:
    """Whether ``classifier`` answers otherwise when it is asked for the same images of ``data`` again."""
    images = _noise(data, 2).to(device_of(classifier))
    with evaluating(classifier), put_back(), torch.no_grad():
        return not torch.allclose(classifier(images), classifier(images), rtol=1e-4, atol=1e-5, equal_nan=True)


def _logits(classifier: nn.Module, images: Tensor, data: DataConfig) -> Tensor:
    """What ``classifier`` gives for ``images``. Raises ConfigError unless it is (N, data.classes)."""
    count = f"{len(images)} image{'s' * (len(images) > 1)}"
    try:
        logits: Any = classifier(images)
    except Exception as error:  # whatever a network says of images that it was not made for
        taken = "" if len(images) == 1 else f" {len(images)} at once"
        raise ConfigError(
            f"the target cannot take {data.channels}x{data.height}x{data.width} images{taken}: {first_line(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"the target must return logits ({len(images)}, classes) for {count}, got {got}")
    if not logits.is_floating_point():
        raise ConfigError(f"the target must return logits as floats, got {logits.dtype}")
    if logits.shape[1] != data.classes:
        raise ConfigError(f"the target gives {logits.shape[1]} classes, but data.classes is {data.classes}")
    return logits


def are_probabilities(logits: Tensor) -> bool:
    """Whether each row of (N, classes) sums to one, and nothing in it is negative."""
    return bool(logits.min() >= 0 and (logits.double().sum(dim=1) - 1).abs().max() < 1e-4)


def _noise(data: DataConfig, count: int) -> Tensor:
    """Images of ``data``, (count, C, H, W), uniform in [0, 1], on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand((count, data.channels, data.height, data.width), generator=generator, device="cpu")


def finite_logits(classifier: nn.Module, data: DataConfig, count: int) -> Tensor:
    """What ``classifier`` gives for so many images of noise. Raises ConfigError where that is not finite."""
    with evaluating(classifier), put_back(), torch.no_grad():
        logits: Tensor = classifier(_noise(data, count).to(device_of(classifier)))
    if not logits.isfinite().all():
        raise ConfigError("the target gives logits that are not finite (NaN or infinity)")
    return logits


def check_alive(classifier: nn.Module, data: DataConfig) -> None:
    """Raise ConfigError where the logits of ``classifier`` are not finite, or the same for all images of ``data``."""
    logits = finite_logits(classifier, data, 4)
    if torch.equal(logits, logits[:1].expand_as(logits)):
        raise ConfigError("the target gives the same logits for every image: its weights are dead")
