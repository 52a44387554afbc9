"""Settings as words of the command line: one by its name, or a YAML file of them, so that all are checked alike."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dircluster.config import ConfigError, first_line, flatten


def flags_of(kind: type, *types: Any, prefix: str = "--") -> Iterator[str]:
    """The flags of a job or section whose values are of one of ``types``, or may be such a word; all without any."""
    for name, annotation in get_type_hints(kind).items():
        kinds = (annotation, *get_args(annotation))
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            inner = prefix if name == "run" else f"{prefix}{name.replace('_', '-')}."
            yield from flags_of(annotation, *types, prefix=inner)
        elif not types or {*types} & {*kinds, *map(get_origin, kinds)}:
            yield prefix + name.replace("_", "-")


@dataclass(frozen=True)
class Flags:
    """The flags of a job, by what their values may be."""

    known: frozenset[str]
    switches: frozenset[str]
    """On or off; those of sections have a form for off, --data.no-flip."""
    worded: frozenset[str]
    """The word on is a value of theirs, and off: true and false are taken for these."""
    optional: frozenset[str]
    """None is a value of theirs."""
    listed: frozenset[str]
    """They take several values."""

    @staticmethod
    def of(kind: type, run: type) -> Flags:
        """The flags of a job of that kind over a run of that type."""

        def found(*types: Any) -> frozenset[str]:
            return frozenset([*flags_of(kind, *types), *flags_of(run, *types)])

        return Flags(found(), found(bool), found("on"), found(type(None)), found(tuple))


class _AsWritten(yaml.SafeLoader):
    """YAML whose values stay as they were written: YAML 1.1 reads 1:4 as 64, 1e-3 as a text and 08 as a mistake.

    What refers to another place of the file is refused: settings do not need it, and nine lines of it are a billion.
    So is a tag (!!binary), which makes another value of what is written.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as its class has it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"line {line} refers to another by *{event.anchor}: write it out")
        if event.tag:
            raise ConfigError(f"line {line} has a tag, {event.tag}: write the value without it")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


_AsWritten.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
SWITCHED = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
"""What is true or false for a switch alone, quoted or not: ``training.capture: on`` is a word, a name may be true."""
NO_SETTINGS = ("config", "help")
"""What a file says to nobody: which file is read, and to read none."""
LONGEST = 1 << 16
"""Characters of a file of settings; all settings of a run are a tenth of it."""
MOST_WORDS = 1000
"""Names and values of a file of settings; a run has some 150 settings."""


def words_of(file: Path, flags: Flags) -> list[str]:
    """A YAML file of settings as command-line words, so that both are checked in the same way. Raises ConfigError."""
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ConfigError(f"it is longer than {LONGEST} characters: give the settings that change alone")
        settings = _settings_of(text, flags)
        words = [word for name, value in settings.items() for word in _checked_words(name, value, flags)]
        if len(words) > MOST_WORDS:
            raise ConfigError(f"it holds {len(words)} names and values, more than the {MOST_WORDS} that a run may need")
    except ConfigError as error:
        raise ConfigError(f"--config {file}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config {file} cannot be read: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = f"in line {error.problem_mark.line + 1}" if error.problem_mark else None
        problem = " ".join(filter(None, (error.context, error.problem, line)))
        raise ConfigError(f"--config {file} is not YAML: {problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} is not YAML: {first_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"--config {file} nests too deep for settings") from error
    return words


def _settings_of(text: str, flags: Flags) -> dict[str, Any]:
    """YAML as settings by their dotted names. Raises ConfigError where one is given twice, or without a value."""
    loader = _AsWritten(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode) or not root.value:
            kinds = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a value"}
            found = kinds.get(type(root), "nothing")
            raise ConfigError(f"it must hold settings, one a line, got {found}")
        lines: dict[str, int] = {}
        for given, line in _named(root):
            name = _switched_on(given, flags)
            if name in lines:
                raise ConfigError(f"{name} is given in line {lines[name]} and again in line {line}: leave one out")
            lines[name] = line
        return {name.replace("-", "_"): value for name, value in flatten(loader.construct_document(root)).items()}
    finally:
        loader.dispose()


def _named(node: yaml.MappingNode, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The dotted names of settings and sections, as fields are written, and the lines that they stand in."""
    for key, value in node.value:
        name = f"{prefix}{key.value}".replace("-", "_")
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            if not value.value:
                raise ConfigError(f"{name} has nothing in it: give a value or settings, or leave the line out")
            yield from _named(value, f"{name}.")


def _switched_on(name: str, flags: Flags) -> str:
    """The name of a switch by its form for off, data.no_flip; any other as it is."""
    section, dot, field = name.rpartition(".")
    on = f"{section}.{field.removeprefix('no_')}"
    return on if dot and as_words(on, "")[0] in flags.switches else name


def _checked_words(name: str, value: Any, flags: Flags) -> list[str]:
    """A setting of a file as command-line words. Raises ConfigError where they could not say its value."""
    flag = as_words(name, "")[0]
    if name in NO_SETTINGS:
        raise ConfigError(f"{name} is no setting: give --{name} on the command line")
    if re.fullmatch(r"[\w.-]+", name) is None:
        raise ConfigError(f"{name!r} is no name of a setting")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and re.match(r"-(?!\.?\d)", item):
            raise ConfigError(f"{name} cannot hold {item!r}, which begins as a flag does")
    on = _switched_on(name, flags)
    if on != name or flag in flags.switches:
        given = SWITCHED.get(str(value).lower())
        if given is None:
            got = "null" if value is None else repr(value)
            raise ConfigError(f"{name} must be true or false, got {got}")
        switched = given if on == name else not given
        return as_words(on, switched) if switched or "." in on else []
    if isinstance(value, list) and flag in flags.known - flags.listed:
        raise ConfigError(f"{name} takes one value, got a list of {len(value)}")
    if value == "None" and flag in flags.optional:
        raise ConfigError(f"{name} cannot be the text None: write null for no value")
    if flag in flags.worded and str(value).lower() in ("true", "false"):
        value = "on" if SWITCHED[str(value).lower()] else "off"
    if value is None and flag in flags.known - flags.optional:
        raise ConfigError(f"{name} must have a value, got null: give one, or leave the line out")
    if value is None and any(known.startswith(f"{flag}.") for known in flags.known):
        raise ConfigError(f"{name} is a section without settings: give one, or leave the line out")
    return as_words(name, value)


def forms_of(flag: str) -> list[str]:
    """How a switch is typed: on, and off where it has a form for that."""
    section, dot, field = flag[2:].rpartition(".")
    return [flag, *([f"--{section}.no-{field}"] if dot else [])]


def as_words(name: str, value: Any) -> list[str]:
    """A setting by its dotted name as command-line words: ("dir.alpha", 2) -> ["--dir.alpha", "2"]."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        section, dot, field = flag[2:].rpartition(".")
        return [flag if value else f"--{section}{dot}no-{field}"]
    values = value if isinstance(value, list | tuple) else [value]
    return [flag, *(str(item) for item in values)]
