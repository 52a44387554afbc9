"""What holds for every input of a kind."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dircluster import rng
from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import LInf
from dircluster.config import ConfigError, from_dict, to_dict
from dircluster.evaluation.statistics import wilson_interval
from dircluster.models.masked_vit import patchify, unpatchify
from dircluster.models.masking import complementary_masks, random_permutations
from dircluster.presets.dir import DirRun, MaskingConfig
from dircluster.training import checkpoint

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Examples take as long as others leave them, and so does drawing them."""
settings.load_profile("busy")


@given(st.integers(1, 80), st.floats(0.01, 0.99), st.integers(1, 12) | st.none(), st.integers(0, 99))
def test_masks_cover_every_patch_or_are_refused(tokens: int, ratio: float, count: int | None, seed: int) -> None:
    masking = MaskingConfig(ratio=ratio, count=count)
    try:
        kept = complementary_masks(random_permutations(rng.generator(seed, "masks"), 3, tokens), masking)
    except ConfigError as refusal:
        few = masking.kept(tokens) * masking.masks < tokens + masking.masks or masking.kept(tokens) == 0
        assert few or masking.masks > max(tokens, 2)
        assert "masking." in str(refusal)  # noqa: PT017
        return
    assert kept.shape == (masking.masks, 3, round((1 - ratio) * tokens))
    for image in range(3):
        assert set(kept[:, image].flatten().tolist()) == set(range(tokens))
        for mask in kept[:, image].tolist():
            assert len(set(mask)) == len(mask)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_inverts_patchify(n: int, channels: int, rows: int, columns: int, patch: int) -> None:
    images = torch.rand(n, channels, rows * patch, columns * patch)
    patches = patchify(images, patch)
    assert patches.shape == (n, rows * columns, channels * patch * patch)
    assert torch.equal(unpatchify(patches, patch, channels, rows * patch, columns * patch), images)


@settings(max_examples=40)
@given(st.floats(0.001, 0.9), st.floats(0.001, 0.9), st.integers(1, 6), st.integers(0, 99))
def test_pgd_stays_in_the_ball_and_the_pixel_range(epsilon: float, step: float, steps: int, seed: int) -> None:
    generator = rng.generator(seed, "pgd")
    images = torch.rand(4, 1, 4, 4, generator=generator)
    weight = torch.randn(16, 3, generator=generator)
    uniform = torch.rand(images.shape, generator=generator)
    found = pgd(
        lambda x: x.flatten(1) @ weight, images, torch.tensor([0, 1, 2, 0]), LInf(epsilon), steps, step, uniform
    )
    assert (found - images).abs().max() <= epsilon + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


@given(st.integers(0, 400), st.integers(1, 400))
def test_an_interval_holds_its_proportion(correct: int, total: int) -> None:
    correct = min(correct, total)
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total + 1e-12
    assert correct / total - 1e-12 <= high <= 1


@given(st.integers(0, 2**31), st.floats(0, 5), st.floats(0.31, 0.5), st.booleans())
def test_configs_round_trip(seed: int, alpha: float, ratio: float, flip: bool) -> None:
    run = DirRun(seed=seed, masking=MaskingConfig(ratio=ratio, count=3))
    run = dataclasses.replace(
        run, dir=dataclasses.replace(run.dir, alpha=alpha), data=dataclasses.replace(run.data, flip=flip)
    )
    assert from_dict(DirRun, to_dict(run)) == run


@settings(max_examples=60)
@given(st.data())
def test_no_flipped_bit_of_a_checkpoint_goes_unseen(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "c"
        checkpoint.write(folder, {"model": {"w": torch.arange(8.0)}}, {"step": 1}, "key")
        file = folder / data.draw(st.sampled_from(sorted(f.name for f in folder.iterdir())))
        blob = bytearray(file.read_bytes())
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(blob)
        try:
            checkpoint.read(folder, "key")
        except checkpoint.CheckpointError as refusal:
            assert "\n" not in str(refusal)  # noqa: PT017
        else:
            raise AssertionError(f"{file.name} was changed and nobody saw it")
