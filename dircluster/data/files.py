"""Files below a folder that are data: links are followed; what is hidden or a system's is left out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dircluster.config import ConfigError, first_line

PARQUET_SUFFIXES = {".parquet", ".pq", ".parq"}
IMAGE_SUFFIXES = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".qoi"),
}
SIDE_SUFFIXES = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".html", ".log", ".mat"}
"""What may lie beside images without being one. Other files are refused: an image that is left out moves labels."""
SYSTEM_NAMES = {
    *("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin"),
    *("system volume information", "lost+found", "lost.dir", "found.000", "recycled", "recycler", "@recycle"),
    *("#snapshot", "network trash folder", "temporary items", "icon\r"),
}
"""What systems leave in folders, in lower case; whatever begins with a dot is hidden anyway."""


def one_line(names: Iterable[str]) -> str:
    """Names in a row; one that would break the line is quoted."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


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
    left_out: tuple[str, ...] = ()
    """Names that might have been data: of folders and parquet files that systems use, or that begin with _."""

    @property
    def notes(self) -> tuple[str, ...]:
        """A line that says what is left out, if anything is."""
        some = one_line(self.left_out[:3]) + ", ..." * (len(self.left_out) > 3)
        return (f"left out, as systems use such names or they begin with _: {some}",) if self.left_out else ()


def listing(folder: Path) -> Listing:
    """What lies below ``folder``. Raises ConfigError where a part of it cannot be read or is a link to nothing."""
    folders: set[tuple[str, ...]] = set()
    left_out: set[str] = set()
    try:
        local = isinstance(folder, Path)
        files = list(_here(folder, folders, left_out) if local else _remote(folder, folders, left_out))
    except OSError as error:
        raise ConfigError(f"data.uri {str(folder)!r} cannot be read: {first_line(error)}") from error
    return Listing(sorted(files, key=lambda found: found.parts), folders, tuple(sorted(left_out)))


def _hidden(name: str, is_folder: bool, left_out: set[str]) -> bool:
    """Whether a name is left out: _temporary is what a writer has for itself, but _MG_0001.JPG is a photo."""
    if name.startswith("."):
        return True
    data = is_folder or Path(name).suffix.lower() in PARQUET_SUFFIXES
    hidden = name.endswith("~") or name.lower() in SYSTEM_NAMES or (data and name.startswith("_"))
    if hidden and data:
        left_out.add(name)
    return hidden


def _here(
    folder: Path,
    folders: set[tuple[str, ...]],
    left_out: set[str],
    parts: tuple[str, ...] = (),
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[Found]:
    """``above`` holds the folders on the way down: a link back to one of them is not followed."""
    facts = folder.stat()
    above |= {(facts.st_dev, facts.st_ino)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or _hidden(entry.name, entry.is_dir(), left_out):
                continue
            below, path = (*parts, entry.name), Path(entry.path)
            if entry.is_dir():
                inner = entry.stat()
                if (inner.st_dev, inner.st_ino) not in above:
                    folders.add(below)
                    yield from _here(path, folders, left_out, below, above)
            elif entry.is_file():
                yield Found(below, path)
            else:
                raise ConfigError(f"{path} is a link to nothing, or no regular file: mend it or take it away")


def _remote(folder: Path, folders: set[tuple[str, ...]], left_out: set[str]) -> Iterator[Found]:
    """The same of a prefix in object storage, where a folder is what files have in their names."""
    found = [Found(path.relative_to(folder).parts, path) for path in folder.glob("**/*")]
    seen = [
        file
        for file in found
        if file.parts and not any(_hidden(name, i < len(file.folders), left_out) for i, name in enumerate(file.parts))
    ]
    folders |= {file.parts[:depth] for file in seen for depth in range(1, len(file.parts))}
    yield from (file for file in seen if file.parts not in folders and file.suffix)
