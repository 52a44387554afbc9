"""Names that others give to the weights of the networks in models.classifiers, as tables of patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

BLOCK = r"((?:conv|bn)[12]\..+)"


def _block(first: int, depth: int) -> Callable[[re.Match[str]], str]:
    """layerSTAGE.INDEX.REST, stages from 1 -> NUMBER.REST, where block 0 of the first stage is number ``first``."""
    return lambda found: f"{first + (int(found[1]) - 1) * depth + int(found[2])}.{found[3]}"


def _resnet18() -> list[Rule]:
    """He et al.'s, as RobustBench, torchvision and timm name it, with a 3x3 stem."""
    number = _block(3, 2)
    return [
        (r"conv1\.(weight)", r"0.\1"),
        (r"bn1\.(.+)", r"1.\1"),
        (rf"layer([1-4])\.([01])\.{BLOCK}", number),
        (
            r"layer([1-4])\.([01])\.(?:shortcut|downsample)\.([01]\..+)",
            lambda found: number(found).replace(".", ".shortcut.", 1),
        ),
        (r"(?:linear|fc|logits|classifier|head)\.(weight|bias)", r"13.\1"),
    ]


def _preactresnet18(normalized: bool) -> list[Rule]:
    """RobustBench's; without normalization before the linear layer the numbers after the blocks are smaller by two."""
    number = _block(1, 2)
    return [
        (r"conv1\.(weight)", r"0.\1"),
        (rf"layer([1-4])\.([01])\.{BLOCK}", number),
        (
            r"layer([1-4])\.([01])\.(?:shortcut|downsample)(?:\.0)?\.(weight)",
            lambda found: number(found).replace(".", ".shortcut.", 1),
        ),
        *([(r"bn\.(.+)", r"9.\1")] if normalized else []),
        (r"(?:linear|fc|logits|classifier|head)\.(weight|bias)", r"13.\1" if normalized else r"11.\1"),
    ]


def _wide_resnet(depth: int) -> list[Rule]:
    """TRADES's and RobustBench's, with ``depth`` blocks a stage; ``sub_block1`` is a copy that nothing runs."""
    number, blocks = _block(1, depth), 3 * depth
    place = r"(?:block|layer)([123])\.(?:layer\.)?(\d+)"
    return [
        (r"sub_block1\..+", ""),
        (r"(?:conv1|init_conv)\.(weight)", r"0.\1"),
        (rf"{place}\.{BLOCK}", number),
        (
            rf"{place}\.(?:convShortcut|conv_shortcut|shortcut\.0|shortcut|downsample\.0)\.(weight)",
            lambda found: number(found).replace(".", ".shortcut.", 1),
        ),
        (r"(?:bn1|bn)\.(.+)", rf"{blocks + 1}.\1"),
        (r"(?:fc|linear|logits|classifier|head)\.(weight|bias)", rf"{blocks + 5}.\1"),
    ]


LAYOUTS: dict[str, list[Rule]] = {
    "resnet18": _resnet18(),
    "preactresnet18": _preactresnet18(True),
    "preactresnet18-raw": _preactresnet18(True),
    "preactresnet18-nobn": _preactresnet18(False),
    "preactresnet18-raw-nobn": _preactresnet18(False),
    "wrn-10-2": _wide_resnet(1),
    "wrn-28-10": _wide_resnet(4),
    "wrn-34-10": _wide_resnet(5),
}
"""Patterns of whole names, and what each becomes; nothing where the weight is not used."""
UNSAID = {
    "resnet18": "the names do not say whether there is a max-pooling behind the stem: here there is none",
    **dict.fromkeys(
        ("preactresnet18", "preactresnet18-raw", "preactresnet18-nobn", "preactresnet18-raw-nobn"),
        "the names do not say whether shortcuts take a block's activated input (preactresnet18, preactresnet18-nobn) or"
        " its raw input (preactresnet18-raw, preactresnet18-raw-nobn): compare the natural accuracy",
    ),
}
"""What weights in these names may mean besides, for whoever loads them."""


def renamed(names: Iterable[str], architecture: str) -> dict[str, str] | None:
    """The name in models.classifiers of each that ``architecture`` has one for; None where one has no meaning there."""
    rules, made = LAYOUTS.get(architecture, []), dict[str, str]()
    for name in names:
        for pattern, new in rules:
            if (found := re.fullmatch(pattern, name)) is not None:
                if becomes := (found.expand(new) if isinstance(new, str) else new(found)):
                    made[name] = becomes
                break
        else:
            return None
    return made if len(set(made.values())) == len(made) else None
