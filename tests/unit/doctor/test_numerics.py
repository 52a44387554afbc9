"""A sound device passes; each check fails on the one thing that is broken for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dircluster.defenses.dir import DirRecipe, MaskedPurifier
from dircluster.doctor import numerics
from dircluster.doctor.findings import Finding
from dircluster.doctor.machine import Machine
from dircluster.presets import preset
from dircluster.rng import Stream

whole_attention, whole_forward, whole_draws = F.scaled_dot_product_attention, MaskedPurifier.forward, DirRecipe.draws


def failed(findings: Iterable[Finding]) -> set[str]:
    return {finding.name for finding in findings if finding.status == "fail"}


def test_a_sound_device_passes(machine: Machine) -> None:
    for check in (numerics.attention, numerics.agreement, numerics.draws, numerics.predictions):
        found = list(check(machine))
        assert found
        assert {finding.status for finding in found} == {"ok"}, found


def test_attention_is_looked_at_in_the_lengths_of_the_purifier(machine: Machine) -> None:
    names = [finding.name for finding in numerics.attention(machine)]
    assert names == [f"attention, T = {length}, {kind}" for length in (9, 17) for kind in ("fp32", "bf16")]


def test_a_purifier_without_attention_is_skipped_with_a_reason(machine: Machine) -> None:
    machine.config = preset("digits_hgd_smoke")
    (found,) = numerics.attention(machine)
    assert (found.status, found.note) == ("skipped", "the purifier calls no scaled_dot_product_attention")


@pytest.mark.parametrize("forward", [True, False])
def test_attention_that_is_off_fails(machine: Machine, forward: bool) -> None:
    """Its last query reads out of bounds, or its gradient does."""

    def off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = whole_attention(q, k, v)
        moved = torch.cat([made[:, :, :-1], made[:, :, -1:] * 1.1], dim=2)
        return moved if forward else made + (moved - moved.detach()) - (made - made.detach())

    assert len(failed(numerics.attention(machine, off))) == 4


@pytest.mark.parametrize("first", [True, False])
def test_attention_that_gives_nan_in_one_kernel_fails(machine: Machine, first: bool) -> None:
    calls: list[int] = []

    def some(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(1)
        return whole_attention(q, k, v) * (float("nan") if len(calls) % 2 == first else 1.0)

    found = list(numerics.attention(machine, some))
    assert len(calls) > len(found)  # several kernels each
    assert {finding.status for finding in found} == {"fail"}


def broken_forward(self: MaskedPurifier, images: Tensor, draws: Tensor | None = None, kind: str = "") -> Tensor:
    """Wrong where it does not compute in float64, as the reference does."""
    made = whole_forward(self, images, draws)
    if images.dtype == torch.float64:
        return made
    return made + 1e-2 if kind == "output" else 2 * made.detach() - made


def test_a_purifier_whose_gradient_is_flipped_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedPurifier, "forward", broken_forward)
    assert failed(numerics.agreement(machine)) == {
        "gradient of g, h, h(g) in fp32",
        "gradient of g, h, h(g) in bf16",
        "equal gradient signs in bf16",
    }


def test_a_purifier_whose_output_is_off_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: MaskedPurifier, *given: Any) -> Tensor:
        return broken_forward(self, *given, kind="output")

    monkeypatch.setattr(MaskedPurifier, "forward", forward)
    assert "output of g, h, h(g) in fp32" in failed(numerics.agreement(machine))


def test_draws_of_the_devices_own_fail(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(self: DirRecipe, stream: Stream, shape: tuple[int, ...]) -> dict[str, Tensor]:
        made = whole_draws(self, stream, shape)
        return {**made, "pgd": torch.rand_like(made["pgd"])}

    monkeypatch.setattr(DirRecipe, "draws", draws)
    found = list(numerics.draws(machine))
    assert failed(found) == {"draws of dir unlike the CPU's"}
    assert next(finding for finding in found if finding.status == "fail").note == "differ: pgd"


def test_attacks_that_find_nothing_in_bf16_fail(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def attack(model: Any, images: Tensor, *given: Any) -> Tensor:
        return images if torch.is_autocast_enabled("cpu") else whole_pgd(model, images, *given)

    whole_pgd = numerics.pgd
    monkeypatch.setattr(numerics, "pgd", attack)
    assert failed(numerics.predictions(machine)) == {"what attacks in bf16 find"}


def test_predictions_that_bf16_changes_fail(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: MaskedPurifier, images: Tensor, draws: Tensor | None = None) -> Tensor:
        made = whole_forward(self, images, draws)
        return made.flip(0) if torch.is_autocast_enabled("cpu") else made

    monkeypatch.setattr(MaskedPurifier, "forward", forward)
    assert "equal predictions in bf16" in failed(numerics.predictions(machine))
