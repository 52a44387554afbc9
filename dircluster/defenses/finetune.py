"""The control that gives a purifier's compute to the target: it trains on, and g(x) = x."""

from __future__ import annotations

from dircluster.defenses.identity import Identity
from dircluster.defenses.stage import Defense, Stage
from dircluster.defenses.target import TargetRecipe, kept_by, passes, target_stage
from dircluster.presets.finetune import FinetuneRun


def stages(run: FinetuneRun) -> tuple[Stage, ...]:
    """The target, and more of it."""
    more = Stage(
        "finetune",
        lambda modules: TargetRecipe(modules["classifier"], run.target, run.attack),
        run.finetune.epochs,
        {"classifier": run.finetune.optimizer},
        sections=("target", "finetune"),
        stored=("purifier", "classifier"),
        passes=passes(run),
        **kept_by(run),
    )
    return (target_stage(run), more)


def describe(run: FinetuneRun) -> str:
    """For the model card."""
    return (
        f"A control: the classifier trained on for {run.finetune.epochs} epochs by its own objective"
        f" ({run.target.objective}), behind g(x) = x, nothing.\n"
        "It gets the compute that a purifier would: one that is not better under the strongest attack is not worth"
        " it.\nRows `none` of its tables are of the classifier as it ends, not of the target that it began as."
    )


DEFENSE = Defense(
    name="finetune",
    run=FinetuneRun,
    modules=lambda run: {"purifier": Identity},
    stages=stages,
    describe=describe,
)
