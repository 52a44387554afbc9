"""Checkpoints that are either whole or absent: data files, then a manifest, then the commit marker, last.

Weights are safetensors and everything else JSON, so that nothing that is read can execute. Readers see committed
folders only, verify sizes and SHA-256 before they parse, and fall back to the checkpoint before a damaged one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from dircluster.config import ConfigError

MANIFEST, COMMIT = "manifest.json", "COMMIT"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

LARGEST = {MANIFEST: 1 << 20, COMMIT: 64, "state.json": 1 << 26}
"""Bytes; a larger file of that name is refused unread."""
LARGEST_TENSORS = 1 << 36
"""Bytes of a file of tensors; a larger one is refused unread."""

Tensors = Mapping[str, Tensor]


class CheckpointError(ConfigError):
    """A checkpoint that is damaged, missing, or of another config."""


class DamagedError(CheckpointError):
    """A committed checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder held: groups of tensors by file name (no suffix), and JSON state."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, tensors: Mapping[str, Tensors], state: Mapping[str, Any], key: str) -> str:
    """Write and commit a checkpoint of config ``key``; -> the SHA-256 of its manifest.

    A folder that exists is taken out of sight (its marker is removed) before its first byte changes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMMIT).unlink(missing_ok=True)
        listed = {}

        def put(name: str, blob: bytes) -> None:
            (folder / name).write_bytes(blob)
            listed[name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}

        for name, group in tensors.items():  # one after the other: of one alone the bytes lie in memory too
            put(f"{name}.safetensors", dump_tensors(storable(group)))
        put("state.json", json.dumps(state, indent=1, sort_keys=True).encode())
        manifest = json.dumps({"config": key, "files": listed}, indent=1, sort_keys=True).encode()
        (folder / MANIFEST).write_bytes(manifest)
        sha = hashlib.sha256(manifest).hexdigest()
        (folder / COMMIT).write_text(sha)
    except OSError as error:
        raise CheckpointError(f"storage.uri: cannot write {folder}: {error.strerror or error}") from error
    return sha


def storable(tensors: Tensors) -> dict[str, Tensor]:
    """``tensors`` as safetensors takes them: on the CPU, contiguous, and none in the memory of another, as tied weights
    are, which are stored by each of their names.
    """
    made, taken = dict[str, Tensor](), set[int]()
    for name, value in tensors.items():
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        memory = plain.untyped_storage().data_ptr()
        made[name] = plain.clone() if memory in taken else plain
        taken.add(memory)
    return made


def digest(folder: Path) -> str | None:
    """SHA-256 of the manifest of a committed folder, None where nothing is committed."""
    try:
        return _bytes(folder / COMMIT, missing=True).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def finished(folder: Path) -> Path:
    """The committed folder that ``folder`` means: itself, or the ``final`` of the stage that it holds."""
    return folder / "final" if digest(folder) is None and digest(folder / "final") is not None else folder


def read(folder: Path, key: str | None = None) -> Checkpoint:
    """Verify and read a committed folder. Raises CheckpointError: missing, damaged, or not of config ``key``."""
    marker = digest(folder)
    if marker is None:
        raise CheckpointError(f"{folder} holds no committed checkpoint")
    manifest_blob = _bytes(folder / MANIFEST)
    if hashlib.sha256(manifest_blob).hexdigest() != marker:
        raise DamagedError(f"{folder} is damaged: its manifest is not the one that was committed")
    try:
        manifest = json.loads(manifest_blob)
        files, written_key = dict(manifest["files"]), str(manifest["config"])
        sizes = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{folder} is damaged: its manifest cannot be read") from error
    if key is not None and written_key != key:
        raise CheckpointError(f"{folder} belongs to another config ({written_key[:12]}, not {key[:12]})")
    tensors: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Any] = {}
    for name, (size, sha) in sizes.items():
        if not _PLAIN_NAME.fullmatch(name) or not (name.endswith(".safetensors") or name == "state.json"):
            raise CheckpointError(f"{folder} is refused: {name!r} is no file of tensors or state")
        blob = _bytes(folder / name, size)
        if len(blob) != size or hashlib.sha256(blob).hexdigest() != sha:
            raise DamagedError(f"{folder} is damaged: {name} is not what was written")
        try:
            if name.endswith(".safetensors"):
                tensors[name.removesuffix(".safetensors")] = parse_tensors(blob)
            else:
                state = dict(json.loads(blob))
        except (SafetensorError, ValueError, TypeError, RecursionError, OverflowError) as error:
            raise DamagedError(f"{folder} is damaged: {name} cannot be parsed") from error
    return Checkpoint(folder, tensors, state)


def _bytes(path: Path, size: int | None = None, missing: bool = False) -> bytes:
    """A file's content. Raises CheckpointError unread where it is a link, too large, or not of the ``size`` given.

    A file that is ``missing`` raises FileNotFoundError where that may be; object storage that does not answer raises
    what it raises: it is no sign of damage.
    """
    most = LARGEST.get(path.name, LARGEST_TENSORS)
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path.parent} is refused: {path.name} is a link")
        found = path.stat().st_size
        if found > most:
            raise CheckpointError(f"{path.parent} is refused: {path.name} has {found:,} bytes, {most:,} at the most")
        if size is not None and found != size:
            raise DamagedError(f"{path.parent} is damaged: {path.name} is not what was written")
        return path.read_bytes()
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        if (gone and missing) or not (gone or isinstance(path, Path)):
            raise
        raise DamagedError(f"{path.parent} is damaged: {path.name} cannot be read") from error


def is_sound(folder: Path, key: str | None = None) -> bool:
    """Whether a folder is committed and can be read whole. Raises CheckpointError where it is of another config."""
    try:
        return digest(folder) is not None and read(folder, key) is not None
    except DamagedError:
        return False


class Checkpoints:
    """The checkpoints of one stage: ``step-N`` folders, of which the newest two stay, and the ``best-N`` they name."""

    KEEP = 2

    def __init__(
        self,
        folder: Path,
        key: str,
        warn: Callable[[str], None] = lambda line: None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """``guard`` is asked before anything is written, and raises where another job holds the folder."""
        self.folder, self.key, self.warn, self.guard = folder, key, warn, guard

    def save(self, step: int, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        """Commit the state after ``step`` steps, then drop what neither of the newest two refers to."""
        self.guard()
        written = self.folder / f"step-{step:08d}"
        write(written, tensors, state, self.key)
        steps = self._committed("step-")
        newest = [folder for folder in steps if folder.name <= written.name][-self.KEEP :]  # later ones were unsound
        keep: set[str | None] = {folder.name for folder in newest}
        keep |= {self._best_of(folder) for folder in newest}
        for folder in [*steps, *self._committed("best-")]:
            if folder.name not in keep:
                with contextlib.suppress(Exception):  # what stays too long is no harm
                    _remove(folder)

    def save_at(self, name: str, tensors: Mapping[str, Tensors], state: Mapping[str, Any]) -> None:
        """Commit a folder of that name; it stays while the ``best`` of a kept checkpoint refers to it."""
        self.guard()
        write(self.folder / name, tensors, state, self.key)

    def latest(self) -> Checkpoint | None:
        """The newest sound checkpoint; a damaged one is passed over with a warning.

        So is one whose best weights are damaged, as long as there is another; else the newest comes without them, and
        the next evaluation chooses again. Raises CheckpointError where the newest belongs to another config.
        """
        without_best: Checkpoint | None = None
        for folder in reversed(self._committed("step-")):
            try:
                found = read(folder, self.key)
                best = self._best_of(folder)
            except CheckpointError as error:
                if "another config" in str(error):
                    raise
                self.warn(f"{error}; falling back to the checkpoint before")
                continue
            try:
                if best is not None:
                    self.at(best)
                return found
            except CheckpointError as error:
                self.warn(f"{error}; looking for a checkpoint with sound best weights")
                without_best = without_best or replace(found, state={**found.state, "best": None})
        return without_best

    def at(self, name: str) -> Checkpoint:
        """The checkpoint of that folder, verified."""
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(f"{self.folder} is refused: {name!r} is not the name of a checkpoint")
        return read(self.folder / name, self.key)

    def _committed(self, prefix: str) -> list[Path]:
        return sorted(f for f in self.folder.glob(f"{prefix}*") if _is_marked(f))

    def _best_of(self, folder: Path) -> str | None:
        try:
            name = json.loads(_bytes(folder / "state.json"))["best"]["folder"]
        except (CheckpointError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return None if name is None else str(name)


def _is_marked(folder: Path) -> bool:
    """Whether a folder holds a commit marker, sound or not: whoever reads it says what is wrong."""
    try:
        return digest(folder) is not None
    except CheckpointError:
        return True


def _remove(folder: Path) -> None:
    (folder / COMMIT).unlink(missing_ok=True)
    for file in folder.iterdir():
        file.unlink()
    if isinstance(folder, Path):  # in object storage a folder ends with its last file
        folder.rmdir()
