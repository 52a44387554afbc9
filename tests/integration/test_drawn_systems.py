"""Smoke twins of the comparison systems that draw: trained, loaded, judged, and swept over their own settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dircluster

LOCAL = ("--launcher", "local", "--scaling.device", "cpu", "--scaling.threads", "1")
SYSTEMS: dict[str, tuple[str, list[Any], str]] = {
    "menet": ("model.method", ["usvt", "soft_impute"], "projector2-eot2"),
    "menet_a": ("menet.lowest", [0.4, 0.5], "bpda2-eot2"),
    "ebm": ("model.steps", [2, 3], "full-gradient2-eot2"),
}
"""A setting of each to vary, and an attack that knows it."""


@pytest.mark.parametrize(
    "system", [name if name == "ebm" else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]
)
def test_a_system_is_trained_loaded_and_judged(system: str, train: Callable[..., Any]) -> None:
    preset, known = f"digits_{system}_smoke", SYSTEMS[system][2]
    done = train(preset, *LOCAL)
    assert done.code == 0, done.out + done.err
    rows = done.summary["results"]
    name = system.removesuffix("_a")
    faced = {(row["defense"], row["attack"], row["randomness"]) for row in rows}
    assert {("none", "natural", "none"), (name, "pgd2", "fixed"), (name, "pgd2", "fresh")} <= faced

    folder = done.summary["checkpoint"]
    defense = dircluster.load_defense(folder)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        known_draws = defense.fixed(0)
        together, alone = known_draws(images), torch.cat([known_draws(image[None]) for image in images])
        assert not torch.equal(defense(images), defense(images))
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert defense.name == name

    judged = train(preset, *LOCAL, "--defense", folder, script="evaluate")
    assert judged.code == 0, judged.err
    assert "evaluation: reused from" in judged.out
    few = ("--suite", "paper", "--no-verdict", "--evaluation.images", "4", "--evaluation.queries", "5")
    judged = train(preset, *LOCAL, "--defense", folder, *few, script="evaluate")
    assert judged.code == 0, judged.err
    assert known in {row["attack"] for row in judged.summary["rows"]}

    again = train(preset, *LOCAL)
    assert again.code == 0
    assert f"{name}: reused from" in again.out


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_is_swept_over_its_own_settings(system: str, train: Callable[..., Any], tmp_path: Path) -> None:
    setting, values, _ = SYSTEMS[system]
    (tmp_path / "space.py").write_text(f"GRID = {{{setting!r}: {values!r}}}\n")
    words = (f"digits_{system}_smoke", "--space", "space.py", "--tracking.no-enabled", *LOCAL[2:])
    swept = train(*words, script="tune")
    assert swept.code == 0, swept.out + swept.err
    assert {trial["status"] for trial in swept.summary["trials"]} == {"FINISHED"}
