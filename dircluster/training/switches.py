"""Whether a machine can do what a run's switches ask of it, before the first stage is trained."""

from __future__ import annotations

from dircluster.config import RunConfig
from dircluster.distributed.parallel import Parallel
from dircluster.training.capture import obstacle_here, obstacle_of, refusal
from dircluster.training.compiling import check_compiler
from dircluster.training.costs import recipe_on_meta
from dircluster.training.optim import is_fused, is_sharded
from dircluster.training.stages import trained_stages


def check_switches(config: RunConfig, parallel: Parallel) -> None:
    """Raise ConfigError where blocks are to be compiled and cannot be, steps to be captured and one cannot be, or an
    update to be one kernel and there is none.
    """
    if config.training.fused == "on":
        for stage in trained_stages(config):
            for knobs in stage.optimizers.values():
                is_fused(config.training, parallel.device, knobs, is_sharded(config, parallel))
    if config.training.compiles:
        check_compiler(parallel.device)
    if config.training.capture != "on":
        return
    if obstacle := obstacle_here(config, parallel, parallel.device.type == "cuda"):
        raise refusal(obstacle)
    for stage in trained_stages(config):
        if obstacle := obstacle_of(recipe_on_meta(config, stage.name)):
            raise refusal(f"of {stage.name} {obstacle}")
