"""The three stages of a run as values: what each one's numbers depend on, and what it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dircluster import rng
from dircluster.config import RunConfig, as_hashed, digest, to_dict
from dircluster.defenses.dir import DirRecipe, PretrainRecipe
from dircluster.defenses.target import TargetRecipe
from dircluster.distributed.parallel import Parallel
from dircluster.models import classifiers
from dircluster.models.masked_vit import MaskedDenoiser
from dircluster.training.trainer import Stage

FORMAT = 2
"""Raised when the same config would give other numbers than before: older stages are then not reused."""


def stage_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The settings that decide a stage's weights, as nested plain data."""
    sections: tuple[str, ...] = {"target": (), "pretrain": ("masking", "model", "pretrain")}.get(
        name, ("masking", "model", "dir")
    )
    if name == "target" or (name == "dir" and config.dir.joint):
        sections = (*sections, "target")
    plain = to_dict(config)
    settings = {section: plain[section] for section in (*sections, "attack", "training")}
    settings.get("target", {}).pop("uri", None)
    settings["data"] = {
        field: plain["data"][field] for field in ("held_out", "crop_padding", "flip", "resize", "stream")
    }
    return {"seed": config.seed, **settings}


def stage_key(config: RunConfig, name: str, inputs: dict[str, str | None]) -> str:
    """SHA-256 of everything that decides a stage's weights: settings, data fingerprint, earlier stages' digests."""
    settings = as_hashed(stage_settings(config, name))
    return digest({"format": FORMAT, "stage": name, "inputs": inputs, **settings})


def build_classifier(config: RunConfig) -> nn.Module:
    """The target with its initial weights, a function of the seed."""
    with rng.seeded_torch_rng(config.seed, "target/weights"):
        return classifiers.build(architecture(config), config.data)


def build_denoiser(config: RunConfig) -> MaskedDenoiser:
    """The denoiser with its initial weights, a function of the seed."""
    data = config.data
    with rng.seeded_torch_rng(config.seed, "denoiser/weights"):
        return MaskedDenoiser(config.model, data.channels, data.height, data.width)


class Models:
    """The run's two models on the worker's device, in the memory layout and form that it runs them best in."""

    classifier: nn.Module
    denoiser: MaskedDenoiser

    def __init__(self, config: RunConfig, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.renew(("classifier", "denoiser"))

    def renew(self, names: tuple[str, ...]) -> None:
        """Make the models of those names again, with initial weights."""
        config, parallel = self.config, self.parallel
        if "classifier" in names:
            classifier = build_classifier(config).to(parallel.device)
            if parallel.device.type == "cuda":
                classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            parallel.synchronize_statistics(classifier)
            if config.training.compile:
                classifier.compile()
            self.classifier = classifier
        if "denoiser" in names:
            denoiser = build_denoiser(config).to(parallel.device)
            denoiser.recompute = config.parallel.activation_checkpointing
            if config.training.compile:
                denoiser.restore_each = torch.compile(denoiser.restore_each)  # type: ignore[method-assign]
            self.denoiser = denoiser


def architecture(config: RunConfig) -> str:
    """The target's architecture: that of ``target.uri`` where it names a timm model."""
    uri = config.target.uri or ""
    return uri if uri.startswith("timm:") else config.target.architecture


def target_stage(config: RunConfig, classifier: nn.Module) -> Stage:
    """Stage 0."""
    recipe = TargetRecipe(classifier, config.target, config.attack)
    return Stage("target", recipe, config.target.epochs, {"classifier": config.target.optimizer})


def pretrain_stage(config: RunConfig, denoiser: MaskedDenoiser, classifier: nn.Module) -> Stage:
    """Stage 1."""
    recipe = PretrainRecipe(denoiser, classifier, config.masking, config.attack)
    return Stage("pretrain", recipe, config.pretrain.epochs, {"denoiser": config.pretrain.optimizer}, selects=False)


def dir_stage(config: RunConfig, denoiser: MaskedDenoiser, classifier: nn.Module) -> Stage:
    """Stage 2."""
    recipe = DirRecipe(denoiser, classifier, config.dir, config.masking, config.attack)
    optimizers = {"denoiser": config.dir.optimizer}
    if config.dir.joint:
        optimizers["classifier"] = config.dir.target_optimizer
    return Stage("dir", recipe, config.dir.epochs, optimizers)


def defense_facts(config: RunConfig) -> dict[str, Any]:
    """What is needed to build the finished defense again, as plain data."""
    plain = to_dict(config)
    shape = {k: plain["data"][k] for k in ("channels", "height", "width", "classes")}
    return {"model": plain["model"], "masking": plain["masking"], "data": shape, "architecture": architecture(config)}
