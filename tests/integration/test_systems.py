"""Every comparison system's smoke twin is trained, loaded and judged, and swept over its own settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dircluster
from dircluster.defenses.table import DEFENSES

LOCAL = ("--launcher", "local", "--scaling.device", "cpu", "--scaling.threads", "1")
GRIDS: dict[str, tuple[str, list[Any]]] = {
    "apegan": ("apegan.content", ["rmse", "mse"]),
    "apegan_a": ("adversarial.objective", ["own", "ce"]),
    "hgd": ("hgd.guidance", ["feature", "logit"]),
    "hgd_a": ("adversarial.objective", ["own", "ce"]),
    "nrp": ("nrp.samples", ["target", "ssp"]),
    "nrp_a": ("adversarial.epochs", [1, 2]),
    "jatp": ("jatp.layer", ["pooled", "map"]),
    "identity": ("attack.steps", [1, 2]),  # it has no settings of its own
    "finetune": ("finetune.epochs", [1, 2]),
}
QUICK = ("nrp_a",)
"""Of three stages, two networks and two updates a step: what the others are made of."""


@pytest.mark.parametrize(
    "system", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in GRIDS]
)
def test_a_system_is_trained_loaded_and_judged(system: str, train: Callable[..., Any]) -> None:
    preset = f"digits_{system}_smoke"
    done = train(preset, *LOCAL)
    assert done.code == 0, done.out + done.err
    rows = done.summary["results"]
    faced = {(row["defense"], row["attack"]) for row in rows}
    assert {("none", "natural"), (system, "natural"), (system, "pgd2"), (system, "transfer-pgd2")} <= faced
    assert {row["randomness"] for row in rows} == {"none"}

    folder = done.summary["checkpoint"]
    defense = dircluster.load_defense(folder)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, alone = defense(images), torch.cat([defense(image[None]) for image in images])
    torch.testing.assert_close(together, alone)  # running statistics: an image's logits are its own
    assert defense.name == system

    judged = train(preset, *LOCAL, "--defense", folder, script="evaluate")
    assert judged.code == 0, judged.err
    assert "evaluation: reused from" in judged.out
    assert judged.summary["rows"] == rows

    again = train(preset, *LOCAL)
    assert again.code == 0
    assert f"{system}: reused from" in again.out


@pytest.mark.slow
@pytest.mark.parametrize("system", GRIDS)
def test_a_system_is_swept_over_its_own_settings(system: str, train: Callable[..., Any], tmp_path: Path) -> None:
    setting, values = GRIDS[system]
    (tmp_path / "space.py").write_text(f"GRID = {{{setting!r}: {values!r}}}\n")
    words = (f"digits_{system}_smoke", "--space", "space.py", "--tracking.no-enabled", *LOCAL[2:])
    swept = train(*words, script="tune")
    assert swept.code == 0, swept.out + swept.err
    assert [trial["settings"] for trial in swept.summary["trials"]] == [{setting: value} for value in values]
    assert {trial["status"] for trial in swept.summary["trials"]} == {"FINISHED"}


def test_every_system_is_here() -> None:
    assert set(DEFENSES) == {"dir", *GRIDS, "menet", "ebm"}  # the last two: test_drawn_systems.py
