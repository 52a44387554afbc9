"""DIR (Zhou et al., ICML 2023): its settings, its presets, and the numbers that the paper prints.

A preset's docstring is a promise: the command, what it costs, and what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, Literal

from dircluster.config import (
    HOW_TRAINED,
    ConfigError,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScalingConfig,
    as_by_itself,
    require,
    require_positive,
    require_share,
)
from dircluster.presets import base
from dircluster.presets.base import (
    NO_DEFENSE,
    SHORT,
    TABLE_1,
    as_one_of,
    changed,
    short_rates,
    smoke_of,
    with_smoke_twins,
)
from dircluster.presets.compared import PIPELINE_CRAFTING, as_svhn


@dataclass(frozen=True)
class MaskingConfig:
    """Information discard: how much of an image each mask hides, and how many masks share an image."""

    ratio: float = 0.5
    """Share of the patches that each mask discards."""
    count: int | None = None
    """Masks an image (K); the fewest that can cover it, ceil(1 / (1 - ratio)), when not given."""

    def __post_init__(self) -> None:
        hint = f"; did you mean {self.ratio / 100:g}?" if 1 < self.ratio < 100 else ""
        require(0 < self.ratio < 1, f"masking.ratio must lie in (0, 1), got {self.ratio:g}{hint}")
        require(self.count is None or self.count >= 1, f"masking.count must be at least 1, got {self.count}")

    @property
    def masks(self) -> int:
        """K, the number of masks an image."""
        return math.ceil(round(1 / (1 - self.ratio), 9)) if self.count is None else self.count

    def kept(self, tokens: int) -> int:
        """Patches that each mask keeps out of ``tokens``."""
        return round(round((1 - self.ratio) * tokens, 9))

    def check(self, tokens: int) -> None:
        """Raise ConfigError unless every one of ``tokens`` patches is kept by at least one mask."""
        kept, gap, most = self.kept(tokens), math.ceil(tokens / self.masks), max(tokens, 2)
        require(
            self.count is None or self.count <= most,
            f"masking.count must be at most the {tokens} patches, got {self.count}",
        )
        if kept == 0:
            raise ConfigError(f"masking.ratio {self.ratio:g} keeps none of {tokens} patches; lower it or model.patch")
        require(
            self.masks <= most,
            f"masking.ratio {self.ratio:g} takes {self.masks} masks of {tokens} patches; lower it, or give"
            f" masking.count {math.ceil(tokens / kept)}",
        )
        require(
            kept >= gap,
            f"masking.count {self.masks} at ratio {self.ratio:g} leaves patches unseen ({self.masks} x {kept} kept of"
            f" {tokens}); use masking.count {math.ceil(tokens / kept)} or more",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The masked ViT auto-encoder that restores images."""

    patch: int = 2
    """Side of a square patch, pixels."""
    width: int = 192
    """Token dimension of encoder and decoder."""
    heads: int = 3
    """Attention heads."""
    encoder_depth: int = 8
    """Transformer blocks over the kept patches."""
    decoder_depth: int = 2
    """Transformer blocks over all patches."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over its token width."""
    head: Literal["linear", "token_mixing"] = "linear"
    """linear: a token gives its own pixels; token_mixing: every patch mixes all tokens (the released code)."""

    def __post_init__(self) -> None:
        require_positive("model", self, "patch", "width", "heads", "encoder_depth", "decoder_depth", "mlp_ratio")
        require(
            self.width % self.heads == 0,
            f"model.width must be a multiple of model.heads, got {self.width} and {self.heads}",
        )
        require(
            self.width * self.mlp_ratio >= 1,
            f"model.mlp_ratio {self.mlp_ratio:g} leaves an MLP of width {self.width} without hidden values",
        )


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 1: the denoiser learns to restore (Eq. 2)."""

    epochs: int = 20
    """Passes over the training split; 0 leaves the stage out (the ablation: set dir.mse_weight to 1)."""
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", lr=1.5e-4 * 128 / 256, weight_decay=0.05, schedule="cosine", warmup_epochs=2
    )

    def __post_init__(self) -> None:
        require(self.epochs >= 0, f"pretrain.epochs must be 0 or more, got {self.epochs}")


@dataclass(frozen=True)
class DirConfig:
    """Stage 2: the game of Algorithm 1 (Eq. 4 to 7)."""

    alpha: float = 2.0
    """Weight of L_rep in Eq. 7."""
    epochs: int = 90
    """Passes over the training split."""
    perturb_steps: int = 5
    """Ascent steps that craft the perturbation of Eq. 4."""
    perturb_step_size: float | None = None
    """Their size, a length like attack.epsilon; attack.step_size's when not given."""
    crafting_masks: Literal["shared", "fresh"] = "shared"
    """shared: crafted under the masks that the update uses; fresh: new masks at every step (released code)."""
    mse_weight: float = 0.0
    """Weight of the squared error between restored and natural images, averaged over pixels (0 in the paper)."""
    joint: bool = False
    """Train the target from scratch together with the denoiser instead of freezing it: by Eq. 7 where target.objective
    is at (released code), else by that objective alone on the whole pipeline."""
    keep: Literal["best", "last"] = "best"
    """What the stage ends on: its best held-out weights by robust accuracy, or its last, which a schedule that ends at
    zero makes good, and no choice among a few noisy measurements can spoil."""
    ema: float | None = None
    """Decay of a running mean of the denoiser's weights (0.998, say), which is then what is validated and kept."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-2)
    """The denoiser's optimizer."""
    target_optimizer: OptimizerConfig = OptimizerConfig()
    """The target's optimizer in joint mode."""

    def __post_init__(self) -> None:
        require_positive("dir", self, "epochs", "perturb_steps")
        require_share("dir.ema", self.ema)
        size = self.perturb_step_size
        require(size is None or size > 0, f"dir.perturb_step_size must be positive, got {size}")
        for name in ("alpha", "mse_weight"):
            require(getattr(self, name) >= 0, f"dir.{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class DirRun(RunConfig):
    """One whole run of DIR: target, pre-training, DIR, evaluation."""

    defense: ClassVar[str] = "dir"
    unread: ClassVar[tuple[str, ...]] = HOW_TRAINED
    crafting: ClassVar[tuple[str, ...]] = PIPELINE_CRAFTING
    lengths: ClassVar[tuple[str, ...]] = (*RunConfig.lengths, "dir.perturb_step_size")
    later: ClassVar[Mapping[str, Any]] = {
        "dir.ema": None,
        "dir.perturb_step_size": None,
        "dir.keep": "best",
        "pretrain.optimizer.gamma": 0.1,
        "dir.optimizer.gamma": 0.1,
        "dir.target_optimizer.gamma": 0.1,
    }

    masking: MaskingConfig = MaskingConfig()
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    dir: DirConfig = DirConfig()

    def __post_init__(self) -> None:
        data, model = self.data, self.model
        for name in ("height", "width"):
            side = getattr(data, name)
            divisors = [p for p in range(1, side + 1) if side % p == 0]
            require(
                side % model.patch == 0,
                f"model.patch must divide data.{name} {side}, got {model.patch};"
                f" try {min(divisors, key=lambda p: abs(p - model.patch))}",
            )
        self.masking.check(self.tokens)
        pixels = model.patch**2 * data.channels
        require(
            model.head == "linear" or model.width % pixels == 0,
            f"model.width must be a multiple of the {pixels} values of a patch for head token_mixing,"
            f" got {model.width}",
        )
        super().__post_init__()
        size = self.dir.perturb_step_size
        require(
            size is None or size < 1 or self.attack.norm == "l2",
            f"dir.perturb_step_size must lie in (0, 1), or be positive for l2, got {size}",
        )
        if self.dir.joint:
            require(self.target.uri is None, "target.uri has no use in joint mode: the target is trained from scratch")
            require(
                self.pretrain.epochs == 0,
                f"pretrain.epochs must be 0 in joint mode (there is no target yet), got {self.pretrain.epochs}",
            )
            require(not self.target.awp, f"target.awp has no use in joint mode, got {self.target.awp}")
            objective = self.target.objective
            require(objective != "natural", "target.objective must be at, trades or mart in joint mode, got natural")
            for name in ("alpha", "mse_weight"):
                value = getattr(self.dir, name)
                require(
                    objective == "at" or value == 0,
                    f"dir.{name} must be 0 where {objective} is learned in joint mode, whose loss has no such term,"
                    f" got {value:g}",
                )

    @property
    def tokens(self) -> int:
        """T, the number of patches of an image."""
        return (self.data.height // self.model.patch) * (self.data.width // self.model.patch)

    @property
    def canonical(self) -> DirRun:
        run = super().canonical
        masking, knobs, target, pretrain = run.masking, run.dir, run.target, run.pretrain
        if masking.count == replace(masking, count=None).masks:
            masking = replace(masking, count=None)
        if knobs.perturb_step_size == run.attack.step_for(knobs.perturb_steps):
            knobs = replace(knobs, perturb_step_size=None)
        usual = _by_itself((self.training.batch_size, self.training.select_images))
        if pretrain.epochs == 0:
            pretrain = replace(usual.pretrain, epochs=0)
        if not knobs.joint:
            knobs = as_by_itself(knobs, usual.dir, "target_optimizer")
        else:
            target = as_by_itself(target, usual.target, "trades_steps", "epochs", "ema", "optimizer")
            if target.objective != "at":
                knobs = as_by_itself(knobs, usual.dir, "perturb_steps", "perturb_step_size")
        knobs = replace(knobs, ema=knobs.ema or None)
        return replace(run, masking=masking, target=target, pretrain=pretrain, dir=knobs)

    @property
    def printed(self) -> Mapping[str, Mapping[str, float]]:
        return PRINTED[self.data.name] if as_one_of(self, cifar10(), svhn()) else {}

    def printed_ablation(self) -> tuple[float, float] | None:
        if "dir" in self.printed:
            whole = self.printed["dir"]
            return whole["natural"], whole["pgd20"]
        other = changed(self, cifar10())
        if other == {"masking.ratio"}:
            return RATIOS.get(self.masking.ratio)
        if other <= {"model.encoder_depth", "model.decoder_depth"}:
            return DEPTHS.get((self.model.encoder_depth, self.model.decoder_depth))
        return None


@cache
def _by_itself(sizes: tuple[int, int]) -> DirRun:
    """What has the settings that nothing reads; smoke presets, known by their sizes, have others in their keys."""
    return smoke_of(DirRun, smaller)() if sizes == (SHORT.batch_size, SHORT.select_images) else DirRun()


def with_paper_crafting(run: DirRun) -> DirRun:
    """``run`` with samples and perturbations as the paper crafts them: PGD-5 on the pipeline and on the target."""
    attack = replace(run.attack, steps=5, training_step_size=None, crafting="pgd", pipeline_steps=1, pipeline_every=1)
    return replace(run, attack=attack, dir=replace(run.dir, perturb_steps=5, perturb_step_size=None))


def with_fast_crafting(run: DirRun) -> DirRun:
    """``run`` with three PGD steps of half the radius on the target, then one on the pipeline, and Eq. 4 in two."""
    half = run.attack.epsilon / 2
    attack = replace(run.attack, steps=3, training_step_size=half, crafting="target_first")
    attack = replace(attack, pipeline_steps=1, pipeline_every=1)
    return replace(run, attack=attack, dir=replace(run.dir, perturb_steps=2, perturb_step_size=half))


PRINTED: dict[str, dict[str, dict[str, float]]] = {
    "cifar10": {
        "none": NO_DEFENSE["cifar10"],
        "dir": {
            **dict(zip(TABLE_1, (85.11, 54.27, 51.34, 55.62, 55.57), strict=True)),
            "masked40": 53.68,  # Eq. 8
            "bpda40": 52.09,  # Table 3, with EOT
            "restored20-from-natural": 42.16,  # Eq. 9
        },
    },
    "svhn": {
        "none": NO_DEFENSE["svhn"],
        "dir": dict(zip(TABLE_1, (90.79, 55.3, 51.61, 56.7, 56.64), strict=True)),
    },
}
"""Percent, by data set, defense (none is the bare target) and attack as tables name it."""
RATIOS = {0.3: (87.34, 49.63), 0.7: (77.68, 50.16)}
"""Section 4.3, CIFAR-10: natural and under PGD-20, by mask ratio."""
DEPTHS = {
    (4, 1): (84.2, 48.23),
    (4, 2): (84.21, 49.97),
    (6, 1): (84.25, 52.01),
    (6, 2): (84.27, 52.63),
    (12, 4): (85.37, 54.32),
}
"""Table 5, CIFAR-10: the same by blocks of encoder and decoder."""


def digits() -> DirRun:
    """scikit-learn's 8x8 handwritten digits: everything for real, in about two minutes on two CPU cores.

    ``python jobs/train.py digits``. Fast crafting, and alpha 0.5: at the paper's 2 one seed of three collapsed after
    this short pre-training, and no alpha above 0 gains anything here (docs/results.md). Two workers where there are
    two cores: one of two threads takes a quarter longer.
    """
    return with_fast_crafting(
        base.digits(
            DirRun,
            model=ModelConfig(patch=2, width=48, heads=4, encoder_depth=2, decoder_depth=1),
            pretrain=PretrainConfig(
                epochs=10,
                optimizer=OptimizerConfig(
                    name="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=2, clip=1.0
                ),
            ),
            dir=DirConfig(
                alpha=0.5,
                epochs=36,
                keep="last",
                optimizer=OptimizerConfig(
                    name="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=4, clip=1.0
                ),
            ),
            scaling=ScalingConfig(workers="1:2"),
        )
    )


def cifar10() -> DirRun:
    """The paper on CIFAR-10 (Section 4.1 and METHOD): ResNet-18 by AT, 20 epochs of pre-training, 90 of DIR.

    ``python jobs/train.py cifar10`` on a machine with a GPU. Its accuracy has not been measured yet; the paper
    prints 85.11 % natural and 54.27 % under PGD-20 (CIFAR-10, Table 1).
    """
    return base.cifar10(DirRun)


def cifar10_fast() -> DirRun:
    """DIR on CIFAR-10 for one GPU and a short while: fast crafting, short schedules, AdamW, a mean of the weights.

    ``python jobs/train.py cifar10_fast``. This preset has not been run or timed as it stands. Its
    recipe was, for 24, 4 and 10.5 epochs by ``infra/gpu/cifar10.py``, the target by PGD-5: 77.4 % natural and 40.6 %
    under PGD-20 with masks known, where the target alone has 83.5 and 47.0 (n = 1,000, one seed, docs/results.md). So
    many epochs of DIR were no better at the end than after nine; crafting, step sizes and AdamW are that run's; a mean
    of the target's weights answered at random there, and is left out. ``cifar10`` is the paper's.
    """
    run = with_fast_crafting(cifar10())
    adamw = OptimizerConfig(name="adamw", lr=5e-4, weight_decay=0.05, schedule="cosine", warmup_epochs=0.5, clip=1.0)
    cycle = OptimizerConfig(lr=0.2, weight_decay=5e-4, schedule="cosine", warmup_epochs=9)
    return replace(
        run,
        name="cifar10_fast",
        target=replace(run.target, epochs=30, optimizer=cycle),
        pretrain=replace(run.pretrain, epochs=5, optimizer=adamw),
        dir=replace(run.dir, epochs=12, ema=0.998, optimizer=adamw),
        training=replace(run.training, batch_size=256, select_every=3),
    )


def cifar10_small() -> DirRun:
    """DIR on all of CIFAR-10 without a GPU: patches of 4 pixels, width 96, over a target of 0.3 M parameters.

    ``python jobs/train.py cifar10_small``: two hours on two cores, on CPUs with bf16 products (AMX) by
    ``--training.precision bf16``. 56.4 % natural and 25.7 % under MALT, of 60.2 and 31.3 of the target alone
    (``zoo:cifar10-small-dir``, first 1,000 test images).
    """
    adamw = OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=0.5, clip=1.0)
    return with_fast_crafting(
        base.cifar10_small(
            DirRun,
            model=ModelConfig(patch=4, width=96, heads=3, encoder_depth=4, decoder_depth=1),
            pretrain=PretrainConfig(epochs=3, optimizer=adamw),
            dir=DirConfig(epochs=6, keep="last", ema=0.998, optimizer=adamw),
        )
    )


def cifar10_joint() -> DirRun:
    """The authors' released code on CIFAR-10: target and denoiser learn together from scratch, alpha 1.

    ``python jobs/train.py cifar10_joint``. Its accuracy has not been measured yet.
    """
    run = cifar10()
    return replace(
        run,
        name="cifar10_joint",
        pretrain=replace(run.pretrain, epochs=0),
        dir=DirConfig(
            alpha=1.0,
            joint=True,
            crafting_masks="fresh",
            optimizer=OptimizerConfig(lr=5e-5, schedule="constant"),
            target_optimizer=OptimizerConfig(lr=0.1),
        ),
    )


def _joint_by(objective: Literal["trades", "mart"], rate: float) -> DirRun:
    """``cifar10_joint`` as two deleted scripts have it (github.com/chenyyyykun/DIR, commits 54014d8 and 7adda4d)."""
    run = cifar10_joint()
    return replace(
        run,
        name=f"cifar10_joint_{objective}",
        attack=replace(run.attack, steps=10),  # --num-steps, of --step-size 2/255: PGD on the cross-entropy in both
        target=replace(run.target, objective=objective, beta=6.0),  # both scripts; usual for MART is 5
        dir=replace(
            run.dir,
            alpha=0.0,  # no L_rep in either
            epochs=91,
            keep="last",  # they store every epoch over the one before
            optimizer=replace(run.dir.optimizer, lr=rate),
            target_optimizer=replace(run.dir.target_optimizer, milestones=(74, 89)),  # their epochs 75 and 90, from 1
        ),
    )


def cifar10_joint_trades() -> DirRun:
    """TRADES on h(g(x)), CIFAR-10: target and denoiser learn together, without L_rep, as in train_trades_ours.py.

    ``python jobs/train.py cifar10_joint_trades``. The authors' script, deleted a day later, begins with a pre-trained
    denoiser, which a rate of 6e-5 is meant for, and stores the target alone. Here the denoiser begins untrained, since
    pre-training (Eq. 2) needs a target to attack, and both are stored. Its accuracy has not been measured yet.
    """
    return _joint_by("trades", 6e-5)


def cifar10_joint_mart() -> DirRun:
    """MART on h(g(x)), CIFAR-10: as ``cifar10_joint_trades``, by train_mart_ours.py, its denoiser at a rate of 5e-5.

    ``python jobs/train.py cifar10_joint_mart``. The script's logarithms have other small constants in them. Its
    accuracy has not been measured yet.
    """
    return _joint_by("mart", 5e-5)


def svhn() -> DirRun:
    """The paper on SVHN: as ``cifar10``, without flips.

    ``python jobs/train.py svhn``. Its accuracy has not been measured yet; the paper prints 90.79 % natural and
    55.30 % under PGD-20 (SVHN, Table 1).
    """
    return as_svhn(cifar10())


def cifar100() -> DirRun:
    """The CIFAR-10 settings on CIFAR-100 (100 fine labels), which the paper does not report.

    ``python jobs/train.py cifar100`` costs what ``cifar10`` costs. Its accuracy has not been measured yet.
    """
    run = cifar10()
    return replace(run, name="cifar100", data=replace(run.data, name="cifar100", classes=100))


def smaller(run: DirRun) -> DirRun:
    """DIR's own sections for a smoke run."""
    image = run.data.height > 8
    return replace(
        run,
        model=ModelConfig(patch=4 if image else run.model.patch, width=24, heads=2, encoder_depth=1, decoder_depth=1),
        pretrain=replace(
            run.pretrain, epochs=min(run.pretrain.epochs, 2), optimizer=short_rates(run.pretrain.optimizer)
        ),
        dir=replace(
            run.dir,
            epochs=2,
            perturb_steps=2,
            optimizer=short_rates(run.dir.optimizer),
            target_optimizer=short_rates(run.dir.target_optimizer),
        ),
    )


def imagenet_smoke() -> DirRun:
    """224 pixels, patch 16, a timm target, shards that are streamed from storage: the whole path in a minute or two.

    It reads ``shards``, which ``python infra/photo_shards.py shards`` writes: tiles of two photographs, from which
    nothing is learned. For ImageNet itself, give the shards and the sizes (``--data.uri s3://BUCKET/imagenet
    --data.classes 1000 --target.uri timm:NAME``) and a model.
    """
    smoke = smoke_of(cifar10, smaller)()
    return replace(
        smoke,
        name="imagenet_smoke",
        data=DataConfig(
            name="custom",
            uri="shards",
            height=224,
            width=224,
            channels=3,
            classes=2,
            flip=True,
            resize=True,
            stream=True,
        ),
        model=replace(smoke.model, patch=16),
        target=replace(smoke.target, architecture="timm:test_vit"),
    )


JOINT = (cifar10_joint, cifar10_joint_trades, cifar10_joint_mart)
PRESETS = with_smoke_twins((digits, cifar10, cifar10_fast, cifar10_small, *JOINT, svhn, cifar100), smaller)
PRESETS["imagenet_smoke"] = imagenet_smoke
