"""What decides the numbers of a run: its images, threat, target and training, as frozen dataclasses.

Numbers in [0, 1] are in units of the pixel range; epochs are passes over the training split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from dircluster.config.errors import require, require_positive, require_share
from dircluster.config.serialize import as_path

LARGEST_SIDE = 1 << 16
"""Pixels."""
LEAST_STD = 1e-5
"""Of images in [0, 1]: 1/65535 makes numbers of 16 bits of them, and nothing takes larger ones."""


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they look."""

    name: Literal["digits", "cifar10", "cifar100", "svhn", "custom"] = "digits"
    """digits lie in scikit-learn's wheel; cifar10, cifar100 (fine labels) and svhn are downloaded by torchvision unless
    uri is given; custom needs uri."""
    uri: str | None = None
    """A parquet file, a folder of parquet files (train*, test*), or train/CLASS/*.png folders."""
    label_column: str | None = None
    """Parquet column of the labels; label, labels, fine_label, ... when not given."""
    image_column: str | None = None
    """Parquet column of the encoded images; image, img, ..., or the only one of bytes when not given."""
    height: int = 8
    """Pixels."""
    width: int = 8
    """Pixels."""
    channels: int = 1
    """1 for gray, 3 for color."""
    classes: int = 10
    """Number of labels, 0 to classes - 1."""
    held_out: float = 0.1
    """Share of the training split that selects models and is never trained on."""
    test_share: float = 0.2
    """Share cut off as the test split where the source has none of its own (the same for every seed)."""
    crop_padding: int = 0
    """Zero padding before a random crop back to size, in pixels; 0 switches it off."""
    flip: bool = False
    """Random horizontal flips."""
    resize: bool = False
    """Cut from the middle of every image the largest part of the shape height x width, and bring it to that size."""
    stream: bool = False
    """Read the training shards (parquet) while they are trained on: for sets larger than memory."""
    limit: int | None = None
    """Read only this many images of each split (a smoke run)."""

    def __post_init__(self) -> None:
        require_positive("data", self, "height", "width", "channels")
        for name in ("height", "width"):
            side = getattr(self, name)
            require(side <= LARGEST_SIDE, f"data.{name} must be at most {LARGEST_SIDE} pixels, got {side}")
        require(self.classes >= 2, f"data.classes must be at least 2, got {self.classes}")
        for name in ("held_out", "test_share"):
            value = getattr(self, name)
            require(0 < value < 1, f"data.{name} must lie in (0, 1), got {value}")
        most = min(self.height, self.width)
        require(
            0 <= self.crop_padding < most,
            f"data.crop_padding must lie in [0, {most}), the images' shorter side, got {self.crop_padding}",
        )
        require(self.limit is None or self.limit >= 10, f"data.limit must be at least 10, got {self.limit}")
        require(
            self.name != "custom" or self.uri is not None,
            "data.uri is missing: a custom data set needs --data.uri PATH (parquet files or image folders)",
        )
        require(
            not self.stream or self.uri is not None,
            "data.uri is missing: data.stream needs --data.uri PATH with parquet shards train* and test*",
        )
        for name in ("label_column", "image_column"):
            require(
                self.uri is not None or getattr(self, name) is None,
                f"data.{name} {getattr(self, name)!r} has no use without --data.uri PATH of parquet files",
            )
        require(not self.stream or self.limit is None, f"data.limit has no use in a stream, got {self.limit}")

    @property
    def canonical(self) -> DataConfig:
        """The same images in one form: a folder's address is its path, and sets that have a name keep their size."""
        return replace(self, uri=_as_path(self.uri), resize=self.resize and self.uri is not None)


def _as_path(uri: str | None) -> str | None:
    return None if uri is None else as_path(uri)


@dataclass(frozen=True)
class AttackConfig:
    """The threat, a ball around each image, and the PGD that crafts training samples within it."""

    epsilon: float = 8 / 255
    """Radius of the ball: the largest change of a pixel (linf), or the Euclidean length of the change of a whole
    image (l2), which may exceed 1."""
    step_size: float | None = None
    """Step of every iterative attack, a length like epsilon. When not given: for linf a quarter of epsilon (2/255 for
    8/255), for l2 2.5 epsilon divided by the attack's number of steps."""
    steps: int = 5
    """PGD steps while training."""
    training_step_size: float | None = None
    """Step of the attacks that craft training samples, but for those of TRADES and n_fgsm; step_size's when not
    given."""
    crafting: Literal["pgd", "target_first", "straight_through", "n_fgsm"] = "pgd"
    """How training samples against a whole pipeline are crafted. pgd: steps on the pipeline (the paper); target_first:
    steps on the target alone, then pipeline_steps on the pipeline; straight_through: the same, the purifier passing
    gradients on as the identity does; n_fgsm: one step of epsilon from noise of twice epsilon, not drawn back."""
    pipeline_steps: int = 1
    """target_first, straight_through: last steps, on the pipeline."""
    pipeline_every: int = 1
    """target_first: takes the pipeline's own gradient at every so many steps of a stage, else is straight_through."""
    norm: Literal["linf", "l2"] = "linf"
    """Which ball: of the maximum norm, or of the Euclidean norm over all pixels and channels of an image."""

    def __post_init__(self) -> None:
        if self.norm == "l2":
            require_positive("attack", self, "epsilon")
            require(
                self.step_size is None or self.step_size > 0,
                f"attack.step_size must be positive, got {self.step_size}",
            )
        else:
            hint = f"; did you mean {self.epsilon:g}/255?" if self.epsilon >= 1 else ""
            require(0 < self.epsilon < 1, f"attack.epsilon must lie in (0, 1), got {self.epsilon:g}{hint}")
            require(
                self.step_size is None or 0 < self.step_size < 1,
                f"attack.step_size must lie in (0, 1), got {self.step_size}",
            )
        require_positive("attack", self, "steps", "pipeline_steps", "pipeline_every")
        own = self.training_step_size
        require(
            own is None or (own > 0 and (own < 1 or self.norm == "l2")),
            f"attack.training_step_size must lie in (0, 1), or be positive for l2, got {own}",
        )
        require(
            self.pipeline_every == 1 or self.crafting == "target_first",
            f"attack.pipeline_every is for attack.crafting target_first, not {self.crafting}",
        )

    @property
    def step(self) -> float:
        """Step size of the attacks that craft training samples, a length like epsilon."""
        return self.step_for(self.steps) if self.training_step_size is None else self.training_step_size

    @property
    def pipeline_gradients(self) -> int:
        """Passes through a whole pipeline, forward and backward, that crafting a training sample takes."""
        return {"pgd": self.steps, "n_fgsm": 1}.get(self.crafting, self.pipeline_steps)

    @property
    def canonical(self) -> AttackConfig:
        """The same attacks in one form: what would be derived is not given, what has no use is as it is by itself."""
        same = replace(self, step_size=None)
        own = self.step_size if self.norm == "l2" or self.step_size != same.step_for(self.steps) else None
        made = replace(self, step_size=own)
        if self.training_step_size == made.step_for(self.steps):
            made = replace(made, training_step_size=None)
        if self.crafting in ("pgd", "n_fgsm"):
            made = replace(made, pipeline_steps=1)
        return made

    def step_for(self, steps: int) -> float:
        """Step size of an attack of ``steps`` steps, a length like epsilon."""
        if self.step_size is not None:
            return self.step_size
        return self.epsilon / 4 if self.norm == "linf" else 2.5 * self.epsilon / steps


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its learning-rate schedule."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """SGD with momentum, Adam, or AdamW."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """SGD's momentum, or Adam's first beta."""
    beta2: float = 0.95
    """Adam's second beta."""
    weight_decay: float = 2e-4
    """L2 penalty (sgd, adam) or decoupled decay (adamw)."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step multiplies the rate by gamma at each milestone; cosine ends at zero."""
    milestones: tuple[int, ...] = (75, 90)
    """Epochs at which the step schedule multiplies the rate by gamma."""
    gamma: float = 0.1
    """Factor of the rate at each milestone."""
    warmup_epochs: float = 0.0
    """Linear warm-up from zero."""
    clip: float | None = None
    """Largest gradient norm; no clipping when not given."""

    def check(self, name: str) -> None:
        """Raise ConfigError where a setting cannot be. The run asks, which knows this optimizer's dotted ``name``."""
        require_positive(name, self, "lr")
        require(0 <= self.momentum < 1, f"{name}.momentum must lie in [0, 1), got {self.momentum}")
        require(0 <= self.beta2 < 1, f"{name}.beta2 must lie in [0, 1), got {self.beta2}")
        require(0 < self.gamma <= 1, f"{name}.gamma must lie in (0, 1], got {self.gamma}")
        require(self.weight_decay >= 0, f"{name}.weight_decay must be 0 or more, got {self.weight_decay}")
        require(self.warmup_epochs >= 0, f"{name}.warmup_epochs must be 0 or more, got {self.warmup_epochs}")
        require(self.clip is None or self.clip > 0, f"{name}.clip must be positive, got {self.clip}")
        require(min(self.milestones, default=1) > 0, f"{name}.milestones must be positive, got {self.milestones}")

    def rate(self, epoch: float, epochs: int) -> float:
        """Learning rate at fractional ``epoch`` of a stage of ``epochs``."""
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            done = (epoch - self.warmup_epochs) / max(epochs - self.warmup_epochs, 1e-9)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.lr

    @property
    def canonical(self) -> OptimizerConfig:
        """The same optimizer in one form: what its kind and schedule do not read is as it is by itself.

        Milestones count in whatever order they are given; without one, or with a factor of 1, the rate is constant.
        """
        made, usual = replace(self, milestones=tuple(sorted(self.milestones))), OptimizerConfig()
        if self.schedule == "step" and (self.gamma == 1 or not self.milestones):
            made = replace(made, schedule="constant")
        if made.schedule != "step":
            made = replace(made, milestones=usual.milestones, gamma=usual.gamma)
        if self.name == "sgd":
            made = replace(made, beta2=usual.beta2)
        return made


ARCHITECTURES = (
    "small_cnn",
    "resnet18",
    "preactresnet18",
    "preactresnet18-raw",
    "preactresnet18-nobn",
    "preactresnet18-raw-nobn",
    "wrn-10-2",
    "wrn-28-10",
    "wrn-34-10",
)
"""Names of the networks that models.classifiers makes."""


@dataclass(frozen=True)
class TargetConfig:
    """Stage 0: the classifier h that the denoiser protects."""

    uri: str | None = None
    """An existing target instead of training one: weights as .safetensors, .pt or .pth, the folder of a checkpoint, a
    models:/ URI, zoo:NAME, or timm:NAME."""
    architecture: str = "resnet18"
    """small_cnn, resnet18 or preactresnet18 (CIFAR stem), wrn-10-2, wrn-28-10 or wrn-34-10 (WideResNet), timm:NAME,
    or package.module:factory (called with classes and channels, or num_classes and in_chans). preactresnet18-raw: its
    shortcuts take a block's raw input; -nobn: no normalization before the linear layer."""
    mean: tuple[float, ...] | None = None
    """What is subtracted from images in [0, 1] before the network, for each channel or for all: for weights that do not
    say it. 0.5 for a network that is trained here, timm's own for timm:NAME."""
    std: tuple[float, ...] | None = None
    """What they are divided by afterwards; with mean, or not at all."""
    entry: str | None = None
    """Which weights of a .pt file that holds several: model, ema, ..."""
    objective: Literal["natural", "at", "trades", "mart"] = "at"
    """Cross-entropy; adversarial training; TRADES; MART."""
    beta: float | None = None
    """Weight of the KL term: 6 for trades, 5 for mart when not given."""
    trades_steps: int = 10
    """Steps of the KL ascent that crafts TRADES samples."""
    awp: float | None = None
    """Adversarial weight perturbation (Wu et al. 2020): how far weights are moved against the loss before a step's
    gradient is taken, as a share of each layer's norm; 0.005 for at and trades in its paper. One worker alone."""
    epochs: int = 110
    """Passes over the training split."""
    ema: float | None = None
    """Decay of a running mean of weights and statistics (0.995, say), which is then what is validated and kept."""
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        require_positive("target", self, "epochs", "trades_steps")
        require_share("target.awp", self.awp)
        require_share("target.ema", self.ema)
        require(self.beta is None or self.beta >= 0, f"target.beta must be 0 or more, got {self.beta}")
        known = self.architecture in ARCHITECTURES or ":" in self.architecture
        require(
            known,
            f"target.architecture must be {', '.join(ARCHITECTURES)}, timm:NAME or package.module:factory,"
            f" got {self.architecture!r}",
        )
        require(
            (self.mean is None) == (self.std is None),
            f"target.{'mean' if self.mean is None else 'std'} is missing: target.mean and target.std go together",
        )
        for name in ("mean", "std"):
            _require_pixels(f"target.{name}", getattr(self, name), LEAST_STD if name == "std" else 0)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and std, where they are given."""
        return None if self.mean is None or self.std is None else (self.mean, self.std)

    @property
    def weight(self) -> float:
        """Weight of the objective's KL term."""
        return (5.0 if self.objective == "mart" else 6.0) if self.beta is None else self.beta

    @property
    def canonical(self) -> TargetConfig:
        """The same target in one form: what would be derived is not given, what has no use is as it is by itself."""
        made = replace(self, uri=_as_path(self.uri), awp=self.awp or None, ema=self.ema or None)
        if self.uri is None:
            made = replace(made, entry=None)
        if self.uri is not None and self.uri.startswith("timm:"):  # which names its architecture too
            made = replace(made, architecture=TargetConfig.architecture)
        if self.objective not in ("trades", "mart") or self.beta == replace(self, beta=None).weight:
            made = replace(made, beta=None)
        if self.objective != "trades":
            made = replace(made, trades_steps=TargetConfig.trades_steps)
        if self.normalization is not None:
            mean, std = (_shortest(values) for values in self.normalization)
            own = self.uri is None and self.architecture in ARCHITECTURES and mean == std == (0.5,)
            made = replace(made, mean=None, std=None) if own else replace(made, mean=mean, std=std)
        return made


def is_own_code(target: TargetConfig) -> bool:
    """Whether package.module:factory makes the target's network: code that whoever loads it must trust."""
    names = (target.architecture, target.uri or "")
    return ":" in target.architecture and not any(name.startswith("timm:") for name in names)


HOW_TRAINED = ("objective", "beta", "trades_steps", "awp", "epochs", "ema", "optimizer")
"""Settings of a target that say how it is trained."""


def _shortest(values: tuple[float, ...]) -> tuple[float, ...]:
    """One value where all channels have the same."""
    decimals = tuple(float(value) + 0.0 for value in values)
    return decimals[:1] if len(set(decimals)) == 1 else decimals


def _require_pixels(name: str, values: tuple[float, ...] | None, least: float) -> None:
    """Raise ConfigError unless ``values`` are missing, or numbers in [least, 1]."""
    if values is None:
        return
    require(len(values) > 0, f"{name} is empty: give a number for each channel, or one for all")
    for value in values:
        hint = f"; did you mean {value:g}/255?" if 1 < value <= 255 else ""
        require(least <= value <= 1, f"{name} must lie in [{least:g}, 1], got {value:g}{hint}")


@dataclass(frozen=True)
class TrainingConfig:
    """What all stages share."""

    batch_size: int = 128
    """Images a step over all workers: results do not depend on how many workers share them."""
    microbatch: int | None = None
    """Most images that pass through the models at a time, their gradients accumulated; a worker's whole share when
    not given. With half a batch, one worker and two compute the same bits, on equal numbers of threads and without
    batch normalization."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a GPU, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile transformer blocks, residual blocks and the units of U-nets, each by itself; auto: on no device.
    It takes a minute or more at first, and its guards cost the host time at every call: on the slow host of the H100
    in docs/results.md no stage became faster."""
    fused: Literal["auto", "on", "off"] = "auto"
    """Optimizers that update all weights in one kernel; auto: on a GPU."""
    draws_ahead: Literal["auto", "on", "off"] = "auto"
    """Make each batch and its draws on a thread while the step before runs: the same bits; auto: on a GPU."""
    capture: Literal["auto", "on", "off"] = "off"
    """Record attack, forward and backward of a step as one CUDA graph and replay it; auto: on a GPU, for one worker
    whose batch passes whole, and for models and recipes of this package. A signal then ends a run between two steps.
    Off until its speed is measured: on an H100 six steps of DIR in fp32 were right (docs/results.md)."""
    select_every: int = 1
    """Epochs between held-out evaluations; the best robust accuracy selects the weights."""
    select_images: int = 1024
    """Held-out images judged each time."""
    select_steps: int | None = None
    """PGD steps that they are judged under; those of the training attack, in its step size, when not given."""

    def __post_init__(self) -> None:
        require_positive("training", self, "batch_size", "select_every", "select_images")
        require(
            self.microbatch is None or self.microbatch > 0,
            f"training.microbatch must be positive, got {self.microbatch}",
        )
        for name in ("compile", "fused", "draws_ahead", "capture"):
            value = getattr(self, name)  # of a config made in Python: it may be a truth value
            require(value in ("auto", "on", "off"), f"training.{name} must be auto, on or off, got {value}")
        require(
            self.select_steps is None or self.select_steps > 0,
            f"training.select_steps must be positive, got {self.select_steps}",
        )

    @property
    def fewest(self) -> int:
        """Images of the smallest micro-batch where one worker has the whole batch."""
        return self.batch_size // math.ceil(self.batch_size / (self.microbatch or self.batch_size))

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled."""
        return self.compile == "on"

    def canonical_under(self, attack: AttackConfig) -> TrainingConfig:
        """The same settings in one form where samples are crafted by ``attack``: what would be derived is not given."""
        made = self
        if self.microbatch is not None and self.microbatch >= self.batch_size:
            made = replace(made, microbatch=None)
        if self.select_steps == attack.steps and attack.step == attack.step_for(attack.steps):
            made = replace(made, select_steps=None)
        return made
