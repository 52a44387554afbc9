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

    def images(self, name: str) -> Tensor | None:
        """The adversarial images that were kept under ``name``, (N, C, H, W) float32; None where none were."""


class StorePart:
    """What lies in another store under a name of its own."""

    def __init__(self, store: ResultStore, name: str) -> None:
        self.store, self.name = store, name

    def get(self, name: str) -> dict[str, Any] | None:
        """What was put under ``name``."""
        return self.store.get(f"{self.name}/{name}")

    def put(self, name: str, outcome: dict[str, Any], images: Tensor) -> None:
        """Keep an outcome."""
        self.store.put(f"{self.name}/{name}", outcome, images)

    def images(self, name: str) -> Tensor | None:
        """The images that were kept."""
        return self.store.images(f"{self.name}/{name}")


class MemoryStore:
    """A store for one process."""

    def __init__(self, keep_images: bool = False) -> None:
        self.kept: dict[str, dict[str, Any]] = {}
        self.keep_images = keep_images
        self.kept_images: dict[str, Tensor] = {}

    def get(self, name: str) -> dict[str, Any] | None:
        """What was put under ``name``."""
        return self.kept.get(name)

    def put(self, name: str, outcome: dict[str, Any], images: Tensor) -> None:
        """Keep an outcome."""
        self.kept[name] = outcome
        if self.keep_images:
            self.kept_images[name] = images

    def images(self, name: str) -> Tensor | None:
        """The images that were kept."""
        return self.kept_images.get(name)


class FolderStore:
    """A store in a folder or in object storage: one file a shard, written whole or not at all."""

    def __init__(self, folder: Path, keep_images: bool = False) -> None:
        self.folder, self.keep_images = folder, keep_images

    def get(self, name: str) -> dict[str, Any] | None:
        """What the shard's file holds; None where there is none, or none that can be read."""
        try:
            outcome = json.loads((self.folder / f"{name}.json").read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        if self.keep_images and self.images(name) is None:
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

    def images(self, name: str) -> Tensor | None:
        """What the file beside the shard's holds; None where there is none, or none that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load((self.folder / f"{name}.safetensors").read_bytes())["images"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
