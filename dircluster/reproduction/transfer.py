"""A finished purifier put in front of another target, as a defense of its own in storage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dircluster.config import digest
from dircluster.training import checkpoint
from dircluster.training.stage_folder import StageFolder, find_stage_folder, keep_once


def transfer_folder(storage: Path, purifier: Path, target: Path) -> StageFolder:
    """Where that defense lies, finished or not, of the folders of two finished ones."""
    return find_stage_folder(storage, "transfer", digest([checkpoint.digest(purifier), checkpoint.digest(target)]))


def transferred(
    storage: Path, purifier: Path, target: Path, owner: str, say: Callable[[str], None], patience: float
) -> Path:
    """The folder of the defense with the purifier of one finished defense and the classifier of another.

    It is written unless it lies there sound; of jobs that come at once by one, for which the others wait. Raises
    CheckpointError where one of the two is damaged.
    """
    made = transfer_folder(storage, purifier, target)

    def write() -> None:
        given, other = checkpoint.read(purifier), checkpoint.read(target)
        tensors = {**given.tensors, "classifier": other.tensors["classifier"]}
        checkpoint.write(made.final, tensors, {"stage": "transfer", "defense": given.state["defense"]}, made.key)

    keep_once(made, write, owner, say, patience)
    return made.final
