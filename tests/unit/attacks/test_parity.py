"""Our attacks against torchattacks', recorded on a fixed model and seed (see parity.py), and against APGD."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dircluster.attacks.gradient import cross_entropy, fgsm, mi_fgsm, pgd, value_and_grad, vni_fgsm
from dircluster.attacks.threat import LInf
from tests.unit.attacks.parity import EPSILON, FILE, SAMPLES, SEED, STEP, STEPS, fixed_images, fixed_model

THREAT = LInf(EPSILON)


def made(name: str) -> Tensor:
    model, (images, labels) = fixed_model(), fixed_images()
    both = value_and_grad(cross_entropy(model, labels))
    torch.manual_seed(SEED)
    if name == "fgsm":
        return fgsm(model, images, labels, THREAT)
    if name == "pgd":
        return pgd(model, images, labels, THREAT, STEPS, STEP, torch.empty_like(images).uniform_())
    if name == "mifgsm":
        return mi_fgsm(both, images, THREAT, STEPS, STEP)
    return vni_fgsm(both, images, THREAT, STEPS, STEP, lambda: torch.randn_like(images).uniform_(), samples=SAMPLES)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mifgsm", "vnifgsm"])
def test_equal_to_torchattacks(name: str) -> None:
    recorded = load_file(FILE)[name]
    torch.testing.assert_close(made(name), recorded, rtol=0, atol=1e-6)
    assert (recorded - fixed_images()[0]).abs().max() > 0.9 * EPSILON
