"""What the field exchanges of an evaluation: all adversarial images as tensors, and the claim as RobustBench has it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dircluster.config import ConfigError, first_line, real_path
from dircluster.data.split import Split
from dircluster.evaluation.session import EvaluationReport
from dircluster.files import check_file, check_writable, replacing

KINDS = (".pt", ".npz")


def check_export(file: Path) -> None:
    """Raise ConfigError unless ``file``, and the claim beside it, can be written as an export."""
    if file.suffix not in KINDS:
        raise ConfigError(f"--export {file}: its name must end in {' or '.join(KINDS)}")
    for each in (file, file.with_suffix(".json")):
        place = real_path(each)
        try:
            check_file(place)
            if place.is_file():  # what takes its place lies beside it first
                check_writable(place.parent)
        except OSError as error:
            raise ConfigError(f"--export {each} cannot be written: {error.strerror}") from error


def exported(report: EvaluationReport, test: Split, numbers: Sequence[int]) -> dict[str, Tensor]:
    """Tensors by name: ``images`` (N, C, H, W) in [0, 1], ``labels`` and ``rows`` of the test split (N,), and the
    adversarial images of each attack, named as its row: ``DEFENSE/ATTACK/RANDOMNESS``.

    ``test`` holds the images judged. Raises LookupError where the evaluation kept no adversarial images.
    """
    made = {"images": test.pixels(), "labels": test.labels, "rows": torch.tensor(numbers)}
    for row, spec in zip(report.rows, report.table, strict=True):
        if spec.epsilon:
            made[f"{row.defense}/{row.attack}/{row.randomness}"] = report.evaluation.adversarial(spec)
    return made


def write_export(tensors: dict[str, Tensor], claim: dict[str, Any], file: Path) -> list[Path]:
    """Write the images into ``file`` and RobustBench's claim beside it, as JSON: -> their paths.

    A .pt holds a dictionary of tensors alone: ``torch.load(file, weights_only=True)``. Raises ConfigError where a file
    cannot be written: those of an earlier export stay as they were.
    """
    beside = file.with_suffix(".json")
    try:
        with replacing(real_path(file)) as images, replacing(real_path(beside)) as text:
            if file.suffix == ".pt":
                torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, images)
            else:
                import numpy as np

                with images.open("wb") as opened:  # a path would get another .npz behind its name
                    np.savez_compressed(opened, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
            text.write_text(json.dumps(claim, indent=1) + "\n")
    except (OSError, RuntimeError) as error:  # the second is what PyTorch says of a full disk
        reason = error.strerror if isinstance(error, OSError) else f"is the disk full? {first_line(error)}"
        raise ConfigError(f"--export {file} cannot be written: {reason}") from error
    return [file, beside]
