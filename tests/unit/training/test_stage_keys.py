"""What decides a stage's weights: keys that later settings leave as they are, so that stored stages are found again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dircluster.config import LATER_FIELDS, SAME_NUMBERS, AttackConfig, as_hashed, flatten, to_dict, with_values
from dircluster.presets import PRESETS, preset
from dircluster.training.stages import find_stage, stage_key, stage_settings

INPUTS: dict[str, str | None] = {"data": "0" * 64}
NEWER = ("cifar10_fast", "digits_jatp", "cifar10_jatp", "svhn_jatp")
"""Presets younger than these settings."""
KEYS = {  # computed at d27d5de, before there were other norms than linf
    "digits": {
        "target": "945442285bea522d34201950766909899d67d73739a9ee9cf28e8283b004ff6e",
        "pretrain": "09cfbe6fc64f6c14e836f5e2716f6e314ed5cf12098a89eb71b2abc35d3e9a55",
        "dir": "711125cd815c7ac1123dcb3e1b5329c1ba805c73d4c942d9788ab1a9e4eb11cb",
    },
    "cifar10": {
        "target": "f95258acb3f8a869bd579ee011beaaec6d9f271e01aec35192a033a8dcfe9fef",
        "pretrain": "f069508def346c000a77579d5bc37af8f1772424680775e96023896f7da4e380",
        "dir": "b6943747a9de34c66579a239138b051415bdb466a5ba4b56796481b4ddf14a21",
    },
    "digits_hgd": {"hgd": "db537b4dc27b6c6b1e7dbaafbdf5a2912d71d4ca7a711222e6a6558364d8901f"},  # computed at f908ee0
    "cifar10_joint": {"dir": "d6412af9c087a0958f7239e54a6608752b86a3d3204ba378b602fcb90c329313"},
    "digits_smoke": {
        "target": "6bdb9a71dacfe5124ce13625d2ae65b0ec35034c34f83fac14d70861e73a9b26",
        "pretrain": "56a35a95f7a49e5fca560bd02104019a43e252b16a5e3588c79d4dc10ecc8d3e",
        "dir": "cc57614f019b4a5bbfdb9c7880e0f46a1a6512522983638f8ccf95148e0459b7",
    },
}


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, keys in KEYS.items() for stage in keys])
def test_stages_stored_by_earlier_versions_are_found(name: str, stage: str) -> None:
    assert stage_key(preset(name), find_stage(preset(name), stage), INPUTS) == KEYS[name][stage]


@pytest.mark.parametrize("stage", ["target", "pretrain", "dir"])
def test_another_norm_is_another_stage(stage: str) -> None:
    run = preset("digits")
    other = replace(run, attack=replace(run.attack, norm="l2", step_size=run.attack.step))
    assert stage_key(other, find_stage(other, stage), INPUTS) != stage_key(run, find_stage(run, stage), INPUTS)
    assert flatten(stage_settings(run, find_stage(run, stage)))["attack.norm"] == "linf"  # what MLflow shows is whole


def test_only_defaults_of_later_settings_are_left_out() -> None:
    plain = to_dict(AttackConfig())
    assert as_hashed({"attack": plain}) == {
        "attack": {k: v for k, v in plain.items() if f"attack.{k}" not in LATER_FIELDS}
    }
    assert {"norm", "crafting"} <= {name.removeprefix("attack.") for name in LATER_FIELDS}
    assert as_hashed({"attack": {**plain, "norm": "l2"}})["attack"]["norm"] == "l2"
    assert as_hashed({"norm": "linf", "dir": {"norm": "linf"}}) == {"norm": "linf", "dir": {"norm": "linf"}}


@pytest.mark.parametrize("field", SAME_NUMBERS)
def test_how_a_number_is_computed_is_in_no_key(field: str) -> None:
    other = with_values(preset("digits"), {field: "on"})
    for stage in ("target", "pretrain", "dir"):
        assert stage_key(other, find_stage(other, stage), INPUTS) == KEYS["digits"][stage]
        assert field in flatten(stage_settings(other, find_stage(other, stage)))


@pytest.mark.parametrize("name", PRESETS)
def test_later_settings_are_settings(name: str) -> None:
    run = preset(name)
    later = {field: LATER_FIELDS[field] for field in LATER_FIELDS if field in flatten(to_dict(run))}
    of_dir = {field for field in LATER_FIELDS if not field.startswith("hgd.")}
    assert of_dir <= set(later) or run.defense != "dir"  # a defense has the sections that it needs
    if not name.startswith(NEWER):
        assert with_values(run, later) == run  # an older preset has their defaults, or its keys would have changed
