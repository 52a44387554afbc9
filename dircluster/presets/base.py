"""What presets share: a small form of a run, to see that all is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dircluster.config import EvaluationConfig, ModelConfig, OptimizerConfig, RunConfig, ScalingConfig, TrainingConfig


def smoke_of(make: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    def smoke() -> RunConfig:
        run = make()
        small = run.data.height > 8
        return replace(
            run,
            name=f"{run.name}_smoke",
            data=replace(run.data, limit=48 if small else 80),
            model=ModelConfig(
                patch=4 if small else run.model.patch, width=24, heads=2, encoder_depth=1, decoder_depth=1
            ),
            attack=replace(run.attack, steps=2),
            target=replace(run.target, epochs=2, optimizer=with_short_rates(run.target.optimizer)),
            pretrain=replace(
                run.pretrain, epochs=min(run.pretrain.epochs, 2), optimizer=with_short_rates(run.pretrain.optimizer)
            ),
            dir=replace(
                run.dir,
                epochs=2,
                perturb_steps=2,
                optimizer=with_short_rates(run.dir.optimizer),
                target_optimizer=with_short_rates(run.dir.target_optimizer),
            ),
            training=TrainingConfig(batch_size=16, microbatch=4, select_images=8),
            scaling=ScalingConfig(threads=1),
            evaluation=EvaluationConfig(images=16, batch_size=8, steps=2, eot=2, draws=2),
            tracking=replace(run.tracking, log_every=1, picture_every=1),
        )

    smoke.__doc__ = f"``{make.__name__}`` through every step in seconds, to see that all is there; learns nothing."
    return smoke


def with_short_rates(optimizer: OptimizerConfig) -> OptimizerConfig:
    """Rates that a few steps from random weights survive."""
    return replace(optimizer, warmup_epochs=min(optimizer.warmup_epochs, 0.5), lr=min(optimizer.lr, 1e-3))
