"""A stage's folder in storage: NAME-KEY, NAME-KEY.2, ..."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dircluster.evaluation.versions import UNKNOWN
from dircluster.files import write_whole
from dircluster.training import checkpoint
from dircluster.training.locks import TakenOverError, stage_lock

TOKEN = "started-by"
"""File that names the job which started a stage from nothing."""
TRAINED_BY = "trained-by"
"""File that names the versions of the code that trained a stage, a line each, in their order. It lies beside the
result, whose digest is that of weights and facts alone: the same weights are the same stage, whatever made them.
"""
KEEPS_SOON = 0.5
"""Seconds between two looks whether another job has kept what both were given."""


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder, the key of its settings, and whether it is finished."""

    name: str
    key: str
    folder: Path

    @property
    def final(self) -> Path:
        """Where the stage's result is committed when it is finished."""
        return self.folder / "final"

    @property
    def digest(self) -> str | None:
        """Digest of the finished result, None before."""
        return checkpoint.digest(self.final)

    @property
    def trained_by(self) -> tuple[str, ...]:
        """The versions of the code that trained it, in their order; empty where none was recorded."""
        try:
            return tuple((self.folder / TRAINED_BY).read_text(errors="replace").splitlines())
        except FileNotFoundError:
            return ()

    def add_version(self, version: str) -> None:
        """Record that ``version`` of the code trains it from here; those before count while a checkpoint is theirs."""
        begun = any(self.folder.glob("step-*"))
        before = (self.trained_by or (UNKNOWN,)) if begun else ()
        if before[-1:] != (version,):
            write_whole(self.folder / TRAINED_BY, "".join(f"{each}\n" for each in (*before, version)).encode())


def find_stage_folder(storage: Path, name: str, key: str, token: str | None = None) -> StageFolder:
    """The newest folder of a stage: NAME-KEY, NAME-KEY.2, ...

    With a ``token`` it is the folder that carries it, made after the newest where there is none yet: so a run that
    starts again leaves what is stored alone, and finds its own folder again after a worker was restarted.
    """
    stem = f"{name}-{key[:12]}"
    pattern = re.compile(rf"{re.escape(stem)}(?:\.(\d+))?")
    folders = {int(m[1] or 1): f for f in storage.glob(f"{stem}*") if (m := pattern.fullmatch(f.name))}
    number = max(folders, default=1)
    if token is not None:
        marked = [n for n, f in folders.items() if (f / TOKEN).is_file() and (f / TOKEN).read_text() == token]
        number = marked[0] if marked else max(folders, default=0) + 1
    stage_folder = StageFolder(name, key, storage / (stem if number == 1 else f"{stem}.{number}"))
    if token is not None and number not in folders:
        stage_folder.folder.mkdir(parents=True)
        (stage_folder.folder / TOKEN).write_text(token)
    return stage_folder


def keep_once(
    stage_folder: StageFolder, write: Callable[[], None], owner: str, say: Callable[[str], None], patience: float
) -> None:
    """Let ``write`` commit the result of a stage that nobody trains, unless it lies there sound.

    Of jobs that come at once one does, and the others wait for it, for up to ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while not checkpoint.is_sound(stage_folder.final, stage_folder.key):
        try:
            with stage_lock(stage_folder.folder, owner, say) as check:
                if not checkpoint.is_sound(stage_folder.final, stage_folder.key):  # or its reader would lose it
                    check()
                    write()
        except TakenOverError:  # another job keeps the same
            if time.monotonic() > deadline:
                raise
            time.sleep(KEEPS_SOON)
