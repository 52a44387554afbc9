"""Plain data and files in a folder of storage, for the same command, or another, to go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dircluster.files import write_whole


class Store:
    """Plain data by name, and files of any kind, in one folder here or in object storage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> dict[str, Any] | None:
        """What was put under ``name``; None where nothing was, or nothing whole."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text())
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, name: str, plain: Mapping[str, Any]) -> None:
        """Keep plain data."""
        self.add_files({f"{name}.json": json.dumps(plain).encode()})

    def add_files(self, files: Mapping[str, bytes]) -> None:
        """Keep files of any kind, by their paths in the folder: each is whole, or as it was."""
        for name, content in files.items():
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, content)
