"""What torchattacks 3.5.1 makes of a fixed model and images, recorded for test_parity.py.

It cannot be installed beside this project. To record again, from the checkout:

    uv pip install --no-deps --target /tmp/torchattacks torchattacks==3.5.1
    PYTHONPATH=.:/tmp/torchattacks .venv/bin/python tests/unit/attacks/parity.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("parity.safetensors")
EPSILON, STEP, STEPS, SAMPLES, SEED = 0.15, 0.0375, 10, 20, 3


def fixed_model() -> nn.Module:
    """A small network of random weights, in float64 so that no gradient's sign hangs on rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10)
        ).double()


def fixed_images() -> tuple[Tensor, Tensor]:
    """Images (16, 1, 8, 8) in [0, 1], and the model's own predictions for labels."""
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images, fixed_model()(images).argmax(dim=1)


def main() -> None:
    """Record."""
    import torchattacks

    model, (images, labels) = fixed_model().eval(), fixed_images()
    size = {"eps": EPSILON, "alpha": STEP, "steps": STEPS}
    attacks = {
        "fgsm": torchattacks.FGSM(model, eps=EPSILON),
        "pgd": torchattacks.PGD(model, **size),
        "mifgsm": torchattacks.MIFGSM(model, **size),
        "vnifgsm": torchattacks.VNIFGSM(model, **size, N=SAMPLES),
    }
    made = {}
    for name, attack in attacks.items():
        torch.manual_seed(SEED)
        made[name] = attack(images, labels).detach().contiguous()
    save_file(made, FILE)


if __name__ == "__main__":
    main()
