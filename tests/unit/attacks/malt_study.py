"""How near MALT and PMA come to AutoAttack standard, and at what part of its time: a line a model.

    python -m tests.unit.attacks.malt_study PRESET FOLDER [FOLDER ...] [--images N] [--steps N] [--bare]

FOLDER is what a run left of a defense (its ``final``), judged under fixed draws that the attacker knows; ``--bare``
judges its target alone as well. PRESET says which test images, and the radius. Times are the process's CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import dircluster
from dircluster.attacks.apgd import TARGETS, ascents, malt, probability_margin_loss
from dircluster.attacks.autoattack import autoattack
from dircluster.attacks.gradient import Model
from dircluster.attacks.threat import LInf, threat_of
from dircluster.data.sources import load
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import under_attack
from dircluster.presets import preset


def models(folders: list[str], bare: bool) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules that are compared."""
    for folder in folders:
        defense = dircluster.load_defense(folder)
        name = f"{defense.name} {Path(folder).parent.name}"
        if bare:
            yield f"{name}, bare", defense.classifier
        yield name, defense


def main() -> None:
    """Compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--images", type=int)
    parser.add_argument("--targets", type=int, default=TARGETS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bare", action="store_true")
    given = parser.parse_args()
    run = preset(given.preset)
    test, threat = load(run.data, 0).test, threat_of(run.attack)
    images, labels = test.pixels(slice(given.images)), test.labels[: given.images]

    def attacks(model: Model) -> dict[str, Callable[[], Tensor]]:
        return {
            "AutoAttack": lambda: autoattack(model, images, labels, threat, "standard", 0, len(images))[0],
            "malt": lambda: malt(model, images, labels, threat, given.steps, 0, given.targets),
            "pma": lambda: ascents(model, images, labels, threat, [probability_margin_loss], 100, 0),
        }

    print(f"{given.preset}, {len(images)} images, {'Linf' if isinstance(threat, LInf) else 'L2'} {threat.epsilon:.4g}")
    for name, module in models(given.folders, given.bare):
        victim = VictimModel(module.eval(), name)
        model = victim.model("fixed" if victim.drawn else "none", 0)
        right, seconds = {}, {}
        with under_attack(module):
            for attack, made in attacks(model).items():
                began = time.process_time()
                found = made()
                seconds[attack] = time.process_time() - began
                with torch.no_grad():
                    right[attack] = model(found).argmax(dim=1) == labels
        print(name)
        for attack, left in right.items():
            missed = int((left & ~right["AutoAttack"]).sum())
            print(
                f"  {attack:10}  {100 * left.double().mean():5.1f} %  {seconds[attack]:7.1f} s CPU"
                f"  ratio {seconds[attack] / seconds['AutoAttack']:.3f}  breaks {missed} fewer of AutoAttack's,"
                f" {int((~left & right['AutoAttack']).sum())} more",
                flush=True,
            )


if __name__ == "__main__":
    main()
