"""Which split a file or folder belongs to, by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from dircluster.config import ConfigError

SPLIT_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "test": ("test", "testing", "tst"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "extra": ("extra", "unsupervised", "unlabeled", "unlabelled"),
}
"""How splits are called. Without a test split, val is it; extra is left out."""
_SPLIT = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_OBJECTS = ("set", "data", "split", "images", "imgs")
_FILLERS = {*_OBJECTS, "of", "part", "shard", "partition", "subset", "parquet"}


@dataclass(frozen=True)
class SplitName:
    """A name that says a split: which, and whether it says nothing else (train-00000-of-00005, but not train_aug)."""

    split: str
    plain: bool


def instead_of_test(val: str) -> str:
    """The note where a split of ``val`` is taken for the test split."""
    return f"no test split is read: {val} is taken for it"


def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case: numbers and hashes are none. cifar10-testSet_2.parquet -> cifar, test, set."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name)
    bare = (re.sub(r"\d+$", "", chunk) for chunk in re.split(r"[\W_]+", name.lower()))
    return tuple(word for word in bare if word and not re.search(r"\d", word))


@lru_cache(maxsize=4096)  # a name is that of a folder of many images
def split_name(name: str) -> SplitName | None:
    """The split that ``name`` (a folder's, or a file's without its suffix) says; None where it says none.

    Raises ConfigError where it says two.
    """
    found = {word: _split(word) for word in words(name)}
    splits = sorted({split for split in found.values() if split})
    if len(splits) > 1:
        raise ConfigError(f"{name!r} names the splits {' and '.join(splits)} at once; give it the name of one")
    if not splits:
        return None
    return SplitName(splits[0], all(split or word in _FILLERS for word, split in found.items()))


def one_split(name: str) -> SplitName | None:
    """The same of a name that may say anything; one that says two, as a sentence may, says none."""
    try:
        return split_name(name)
    except ConfigError:
        return None


def _split(word: str) -> str | None:
    """train, trainset and traindata are one word; tests, trainers and valley are none."""
    ending = next((end for end in _OBJECTS if word.endswith(end) and word != end), "")
    return _SPLIT.get(word) or _SPLIT.get(word.removesuffix(ending))
