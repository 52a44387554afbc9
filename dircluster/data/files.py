"""Files below a folder that are data: links are followed, hidden and system files are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dircluster.config import ConfigError, first_line

PARQUET_SUFFIXES = {".parquet", ".pq", ".parq"}
IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".qoi"),
}
SYSTEM_NAMES = {
    *("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin"),
    *("system volume information", "lost+found", "icon\r"),
}
"""What systems leave in folders, in lower case; whatever begins with a dot is hidden anyway."""


@dataclass(frozen=True)
class Found:
    """A file, and the names that lead to it from the folder that was searched, its own name last."""

    parts: tuple[str, ...]
    path: Path

    @property
    def folders(self) -> tuple[str, ...]:
        return self.parts[:-1]

    @property
    def suffix(self) -> str:
        """In lower case, with its dot."""
        return self.path.suffix.lower()


@dataclass(frozen=True)
class Listing:
    """All visible files below a folder, in the order of their names, and all visible folders."""

    files: list[Found]
    folders: set[tuple[str, ...]]


def listing(folder: Path) -> Listing:
    """What lies below ``folder``. Raises ConfigError where a part of it cannot be read or is a link to nothing."""
    folders: set[tuple[str, ...]] = set()
    try:
        files = list(_here(folder, folders) if isinstance(folder, Path) else _remote(folder, folders))
    except OSError as error:
        raise ConfigError(f"data.uri {str(folder)!r} cannot be read: {first_line(error)}") from error
    return Listing(sorted(files, key=lambda found: found.parts), folders)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.endswith("~") or name.lower() in SYSTEM_NAMES


def _here(
    folder: Path,
    folders: set[tuple[str, ...]],
    parts: tuple[str, ...] = (),
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[Found]:
    """``above`` holds the folders on the way down: a link back to one of them is not followed."""
    facts = folder.stat()
    above |= {(facts.st_dev, facts.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                continue
            below, path = (*parts, entry.name), Path(entry.path)
            if entry.is_dir():
                inner = entry.stat()
                if (inner.st_dev, inner.st_ino) not in above:
                    folders.add(below)
                    yield from _here(path, folders, below, above)
            elif entry.is_file():
                yield Found(below, path)
            else:
                raise ConfigError(f"{path} is a link to nothing, or no regular file: mend it or take it away")


def _remote(folder: Path, folders: set[tuple[str, ...]]) -> Iterator[Found]:
    """The same of a prefix in object storage, where a folder is what files have in their names."""
    found = [Found(path.relative_to(folder).parts, path) for path in folder.glob("**/*")]
    seen = [file for file in found if file.parts and not any(map(_hidden, file.parts))]
    folders |= {file.parts[:depth] for file in seen for depth in range(1, len(file.parts))}
    yield from (file for file in seen if file.parts not in folders and file.suffix)
