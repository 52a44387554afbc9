"""Which files are shards of one set, by their names: train-0 and train-1 are, cifar10 and cifar100 are not.

Words and numbers of a name are kept, but for hashes and for the number of the shard: one that is counted from 0 or 1
without a gap, padded with zeros, or called a part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_PARTS = {"part", "partition", "shard", "chunk"}
"""A number that follows one of these is that of a shard, whatever the others are."""
_OTHERS = {"of", "v", "ver", "version", "rev", "revision", "fold", "seed", "run", "level", "severity", "task", "epoch"}
"""A number that follows one of these is none."""
_TAILS = {"c", "of", "tid", "data", "parquet", "snappy", "gz", "gzip", "zstd", "zst", "lz4", "brotli"}
"""What writers put behind the number of a shard."""
_UUID = re.compile(r"(?<![0-9a-z])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-z])")
_BREAK = re.compile(r"(?:[^\w.]|_|(?<!\d)\.|\.(?!\d))+")
_NUMBER = re.compile(r"\d+(?:\.\d+)*")


def set_names(names: Sequence[str]) -> list[str]:
    """The set of each name: its words in lower case, with * for the number of a shard. Folders are parted by /."""
    shown = ["/".join(" ".join(_chunks(part)) for part in name.split("/")) for name in names]
    rows: dict[str, list[list[str]]] = {}
    for name in shown:
        rows.setdefault(_NUMBER.sub("#", name), []).append(_NUMBER.findall(name))
    shards = {pattern: _shards(pattern, given) for pattern, given in rows.items()}
    return [_filled(name, shards[_NUMBER.sub("#", name)]) for name in shown]


def _chunks(name: str) -> list[str]:
    """What separators part, without hashes. trainSet-0.snappy -> train, set, 0, snappy; v1.0 is one."""
    name = _UUID.sub("-", re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower())
    return [chunk for chunk in _BREAK.split(name) if chunk and not _is_hash(chunk)]


def _is_hash(chunk: str) -> bool:
    """Whether a chunk is hexadecimal, or long, and no word with a number behind it."""
    if re.fullmatch(r"[0-9a-f]{16,}", chunk):
        return True
    both = re.search(r"\d", chunk) and re.search(r"[a-z]", chunk)
    if both and re.fullmatch(r"[0-9a-f]{8,}", chunk):
        return True
    turns = len(re.findall(r"[a-z](?=\d)|\d(?=[a-z])", chunk))
    long = re.fullmatch(r"[0-9a-z]{16,}", chunk) and turns > 3
    return bool(both and (re.fullmatch(r"[0-9a-f]{5,}", chunk) or long) and not re.fullmatch(r"[a-z]+\d+", chunk))


def _shards(pattern: str, rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which numbers of names of one pattern (a # for each number) are of shards; one that all have alike is none."""
    texts, found, begun = pattern.split("#"), list[bool](), False
    for index, values in enumerate(map(set, zip(*rows, strict=True))):
        before, after = texts[index], "#".join(texts[index + 1 :])
        word = "".join(re.findall(r"([^\W\d_]*) ?$", before)[:1])
        if word in _OTHERS or after[:1] not in ("", " ", "/"):
            found.append(False)
            continue
        padded = _padded(values)
        last = not word or set(re.findall(r"[^\W\d_]+", after)) <= _TAILS
        sure = begun or padded or word in _PARTS or after.startswith(" of #")
        found.append(len(values) > 1 and (sure or (last and _counted(values))))
        begun = begun or any(value.startswith("0") for value in values)  # numbers behind it are the writer's
    return found


def _padded(values: Collection[str]) -> bool:
    """Whether numbers are written with zeros in front as writers of shards do: 00000 and 00017, not 064 and 128."""
    width = min(map(len, values))
    fit = all(value.isdigit() and (len(value) == width or value[0] != "0") for value in values)
    sure = width >= 4 or (width > 1 and max(map(len, values)) > width)  # 99, 100: counted past the zeros
    return fit and sure and any(value[0] == "0" for value in values)


def _counted(values: Collection[str]) -> bool:
    """Whether whole numbers run from 0 or 1 without a gap."""
    if not all(value.isdigit() for value in values):
        return False
    numbers = sorted({int(value) for value in values})
    return numbers[0] in (0, 1) and numbers[-1] - numbers[0] == len(numbers) - 1


def _filled(name: str, shards: Sequence[bool]) -> str:
    number = iter(shards)
    return _NUMBER.sub(lambda match: "*" if next(number) else match[0], name)
