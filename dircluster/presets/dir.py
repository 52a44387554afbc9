"""DIR's presets. A docstring is a promise: the command, what it costs, and what was measured."""

from __future__ import annotations

from dataclasses import replace

from dircluster.config import (
    AttackConfig,
    DataConfig,
    DirConfig,
    ModelConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    StorageConfig,
    TargetConfig,
    TrackingConfig,
    TrainingConfig,
)
from dircluster.presets.base import smoke_of


def digits() -> RunConfig:
    """scikit-learn's 8x8 handwritten digits: everything for real, in minutes, on two CPU cores."""
    return RunConfig(
        name="digits",
        data=DataConfig(name="digits", height=8, width=8, channels=1, crop_padding=1),
        attack=AttackConfig(epsilon=0.15),
        model=ModelConfig(patch=2, width=48, heads=4, encoder_depth=2, decoder_depth=1),
        target=TargetConfig(
            architecture="small_cnn",
            epochs=150,
            optimizer=OptimizerConfig(
                name="adamw", lr=2e-3, weight_decay=1e-4, schedule="cosine", warmup_epochs=15, clip=1.0
            ),
        ),
        pretrain=PretrainConfig(
            epochs=20,
            optimizer=OptimizerConfig(
                name="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=2, clip=1.0
            ),
        ),
        dir=DirConfig(
            epochs=60,
            optimizer=OptimizerConfig(
                name="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", warmup_epochs=6, clip=1.0
            ),
        ),
        training=TrainingConfig(batch_size=128, select_every=10),
        storage=StorageConfig(checkpoint_every=200),
        tracking=TrackingConfig(log_every=10, picture_every=10),
    )


def cifar10() -> RunConfig:
    """The paper on CIFAR-10 (Section 4.1 and METHOD): ResNet-18 by AT, 20 epochs of pre-training, 90 of DIR.

    ``python jobs/train.py cifar10`` on a machine with a GPU. Its accuracy has not been measured yet; the paper
    prints 85.11 % natural and 54.27 % under PGD-20 (CIFAR-10, Table 1).
    """
    return RunConfig(
        name="cifar10",
        data=DataConfig(name="cifar10", height=32, width=32, channels=3, crop_padding=4, flip=True),
        target=TargetConfig(architecture="resnet18", epochs=110),
    )


def cifar10_joint() -> RunConfig:
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


def svhn() -> RunConfig:
    """The paper on SVHN: as ``cifar10``, without flips.

    ``python jobs/train.py svhn``. Its accuracy has not been measured yet; the paper prints 90.79 % natural and
    55.30 % under PGD-20 (SVHN, Table 1).
    """
    run = cifar10()
    return replace(run, name="svhn", data=replace(run.data, name="svhn", flip=False))


def cifar100() -> RunConfig:
    """The CIFAR-10 settings on CIFAR-100 (100 fine labels), which the paper does not report.

    ``python jobs/train.py cifar100`` costs what ``cifar10`` costs. Its accuracy has not been measured yet.
    """
    run = cifar10()
    return replace(run, name="cifar100", data=replace(run.data, name="cifar100", classes=100))


def imagenet_smoke() -> RunConfig:
    """224 pixels, patch 16, a timm target, shards that are streamed from storage: the whole path in a minute or two.

    The images are tiles of two photographs; nothing is learned. For ImageNet itself, give the shards and the sizes
    (``--data.name custom --data.uri s3://BUCKET/imagenet --data.classes 1000 --target.uri timm:NAME``) and a model.
    """
    smoke = cifar10_smoke()
    return replace(
        smoke,
        name="imagenet_smoke",
        data=DataConfig(
            name="photos", height=224, width=224, channels=3, classes=2, flip=True, resize=True, stream=True
        ),
        model=replace(smoke.model, patch=16),
        target=replace(smoke.target, architecture="timm:test_vit"),
    )


cifar10_smoke = smoke_of(cifar10)
