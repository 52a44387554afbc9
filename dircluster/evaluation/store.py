"""Where the outcomes of an evaluation's shards are kept: in memory, in a folder, in object storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class ResultStore(Protocol):
    """Keeps the outcomes of shards, by name."""

    def get(self, name: str) -> dict[str, Any] | None:
        """What was put under ``name``, None where nothing was."""

    def put(self, name: str, outcome: dict[str, Any], images: Tensor) -> None:
        """Keep an outcome, and where asked its adversarial images (N, C, H, W)."""


class MemoryStore:
    """A store for one process."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """What was put under ``name``."""
        return self.kept.get(name)

    def put(self, name: str, outcome: dict[str, Any], images: Tensor) -> None:
        """Keep an outcome."""
        self.kept[name] = outcome


class FolderStore:
    """A store in a folder or in object storage: one file a shard, written whole or not at all."""

    def __init__(self, folder: Path, keep_images: bool = False) -> None:
        self.folder, self.keep_images = folder, keep_images

    def get(self, name: str) -> dict[str, Any] | None:
        """What the shard's file holds; None where there is none, or none that can be read."""
        try:
            outcome = json.loads((self.folder / f"{name}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        if self.keep_images and not (self.folder / f"{name}.safetensors").exists():
            return None
        return outcome if isinstance(outcome, dict) and {"right", "sha256"} <= set(outcome) else None

    def put(self, name: str, outcome: dict[str, Any], images: Tensor) -> None:
        """Write images, then the outcome, which stands for both."""
        from safetensors.torch import save

        from dircluster.files import write_whole

        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        if self.keep_images:
            write_whole(self.folder / f"{name}.safetensors", save({"images": images.contiguous()}))
        write_whole(self.folder / f"{name}.json", json.dumps(outcome).encode())
