"""The control without a purifier: g(x) = x in front of the target that all systems protect."""

from __future__ import annotations

from torch import Tensor

from dircluster.defenses.base import Purifier
from dircluster.defenses.stage import Defense, Stage
from dircluster.defenses.target import TargetRecipe, target_stage
from dircluster.presets.identity import IdentityRun


class Identity(Purifier):
    """g(x) = x: no weights, nothing drawn."""

    reads_whole = True

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> the same."""
        return images


def stages(run: IdentityRun) -> tuple[Stage, ...]:
    """The target, and a stage without steps that stores it as a defense."""
    kept = Stage(
        "identity",
        lambda modules: TargetRecipe(modules["classifier"], run.target, run.attack),
        0,
        {"classifier": run.target.optimizer},
        stored=("purifier", "classifier"),
    )
    return (target_stage(run), kept)


def describe(run: IdentityRun) -> str:
    """For the model card."""
    return (
        "A control: the classifier behind g(x) = x, nothing. A purifier in front of the same classifier that is not\n"
        "better than this under the strongest attack does nothing for it."
    )


DEFENSE = Defense(
    name="identity",
    run=IdentityRun,
    modules=lambda run: {"purifier": Identity},
    stages=stages,
    describe=describe,
)
