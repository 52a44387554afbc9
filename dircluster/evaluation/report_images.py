"""What a report says of every image: its class, what was predicted under each attack and draw, and some pictures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dircluster import rng
from dircluster.config import ConfigError, first_line
from dircluster.evaluation.attack_table import find_attack
from dircluster.evaluation.pictures import as_bytes, to_sheet
from dircluster.evaluation.session import EvaluationReport
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import device_of, evaluating

SIGNS = "0123456789abcdefghijklmnopqrstuvwxyz"
COLUMNS = 25
"""Pictures in a row of a sheet."""


def image_table(report: EvaluationReport, labels: Tensor, rows: Sequence[int], data: str) -> dict[str, Any]:
    """Every image's outcomes, for JSON. ``labels`` (N,) of the images judged, ``rows`` their numbers in the test split.

    A class is ``width`` signs to the base of 36, and hyphens where an answer was wrong and no class is known; texts
    hold image after image, and the draws of an image side by side. ``data`` tells the images from others.
    """
    evaluation = report.evaluation
    found = [(evaluation.right(spec), evaluation.predicted(spec)) for spec in report.table]
    highest = max([int(labels.max()), *(int(part.max()) for _, known in found for part in known.values())])
    width = next(width for width in itertools.count(1) if highest < len(SIGNS) ** width)
    listed = []
    for row, spec, (right, known) in zip(report.rows, report.table, found, strict=True):
        asked = labels[: row.total]
        answers = {
            name: known.get(name, torch.where(part, asked[:, None], -1)) for name, part in right.items()
        }  # a row that no class decides says right or wrong
        listed.append(
            {
                "defense": "target" if spec.judged == "target" else "defense",
                "attack": row.attack,
                "randomness": row.randomness,
                "epsilon": row.epsilon,
                "marks": [str(mark) for mark in row.marks],
                "natural": row.natural and row.natural.accuracy,
                "luck": row.luck if row.randomness == "fresh" else None,
                **{name: as_signs(part, width) for name, part in answers.items()},
            }
        )
    return {
        "data": data,
        "width": width,
        "labels": as_signs(labels, width),
        "numbers": None if list(rows) == list(range(len(rows))) else list(rows),
        "rows": listed,
    }


def as_signs(classes: Tensor, width: int) -> str:
    """Classes of any shape, -1 for an unknown one, as one text of ``width`` signs each."""
    names = ["".join(signs) for signs in itertools.product(SIGNS, repeat=width)] + ["-" * width]  # the last is -1
    return "".join(names[c] for c in classes.flatten().tolist())


def read_report(file: Path) -> dict[str, Any]:
    """A report's JSON. Raises ConfigError where the file is none, or one without images."""
    try:
        plain = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"--compare {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--compare {file} is not JSON: {first_line(error)}") from error
    table = plain.get("images") if isinstance(plain, Mapping) else None
    if not isinstance(table, dict) or not {"data", "width", "labels", "numbers", "rows"} <= set(table):
        raise ConfigError(f"--compare {file} holds no outcomes of images: give the report-*.json of an evaluation")
    return dict(plain)


def check_same_data(plain: Mapping[str, Any], data: str, file: Path) -> None:
    """Raise ConfigError unless a report's JSON is of the test split with the digest ``data``."""
    if plain["images"]["data"] != data:
        raise ConfigError(f"--compare {file} is of other images than these: both reports must be of one test split")


def sheets(report: EvaluationReport, victim: VictimModel, images: Tensor, seed: int) -> dict[str, Any] | None:
    """Natural, adversarial and purified pictures of the first images, a sheet each; None where none were kept.

    ``images`` (N, C, H, W) in [0, 1] are those judged. The adversarial picture is that of the attack that left the
    fewest draws right, of those on what the defense is given; ``row`` says which for each image.
    """
    evaluation = report.evaluation
    attacked = [
        (number, pictures, evaluation.shares(spec)[: len(pictures)])
        for number, spec in enumerate(report.table)
        if spec.judged == "defense"
        and spec.epsilon
        and not find_attack(spec.attack).past_purifier
        and (pictures := evaluation.pictures(spec)) is not None
    ]
    if not attacked:
        return None
    count = min(len(pictures) for _, pictures, _ in attacked)
    attacked.sort(key=lambda each: report.rows[each[0]].accuracy)  # among equals, the attack that is strongest on all
    strongest = torch.stack([share[:count] for *_, share in attacked]).argmin(dim=0)
    adversarial = torch.stack([pictures[:count] for _, pictures, _ in attacked])[strongest, torch.arange(count)]
    made = {"natural": as_bytes(images[:count]), "adversarial": adversarial}
    if victim.target is not None:
        made["purified"] = _purified(report, victim, adversarial, seed)
    return {
        "count": count,
        "columns": COLUMNS,
        "height": images.shape[2],
        "width": images.shape[3],
        "row": [attacked[each][0] for each in strongest.tolist()],
        "sheets": {name: to_sheet(pictures, COLUMNS) for name, pictures in made.items()},
    }


def without_pictures(shown: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`sheets` gives, with the names of the sheets alone: the page decodes pictures when they are seen."""
    return {**shown, "sheets": list(shown["sheets"])}


def _purified(report: EvaluationReport, victim: VictimModel, pictures: Tensor, seed: int) -> Tensor:
    """What the purifier makes of pictures (N, C, H, W) uint8, under draws of the report's own."""
    device, made, size = device_of(victim.module), [], report.evaluation.shard_size
    with evaluating(*victim.modules), torch.no_grad():
        for start in range(0, len(pictures), size):
            part = pictures[start : start + size]
            restore = victim.restorer("fixed", rng.entropy(seed, "report/purified", step=start), len(part))
            made.append(as_bytes(restore(part.to(device).float() / 255)))
    return torch.cat(made)
