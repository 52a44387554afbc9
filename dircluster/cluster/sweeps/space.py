"""What a sweep varies and over what: plain data from a file, checked against the run that it varies."""

from __future__ import annotations

import itertools
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dircluster.config import (
    ANY_ERROR,
    ConfigError,
    RunConfig,
    digest,
    flatten,
    named_line,
    real_path,
    short,
    to_dict,
    varied,
    with_values,
)

Settings = Mapping[str, Any]
Range = tuple[float, float] | tuple[float, float, str] | list[Any]
"""Two ends, both included, of whole numbers where both are, and "log" after them where each order of magnitude is as
likely as the others; or the values to choose from."""
LOG = "log"


@dataclass(frozen=True)
class Space:
    """Points to train, and ranges to search, over names of settings such as ``dir.alpha``."""

    name: str
    points: tuple[Settings, ...]
    ranges: Mapping[str, Range]

    @property
    def varied(self) -> list[str]:
        """The names of what varies, in the file's order."""
        return list(dict.fromkeys(name for settings in (*self.points, self.ranges) for name in settings))

    @property
    def plain(self) -> dict[str, Any]:
        """For digests: what tells it from others, whatever its name."""
        ranges = {n: {"ends" if isinstance(v, tuple) else "values": list(v)} for n, v in self.ranges.items()}
        return {"points": list(self.points), "ranges": ranges}


def load_space(path: Path) -> Space:
    """The space in a Python file: ``GRID``, a list of points or lists of values whose product they are, ``SEARCH``,
    ranges (low, high), (low, high, "log") or lists of values, or both. Raises ConfigError where it holds none.
    """
    if not real_path(path).is_file():
        raise ConfigError(f"--space {path} does not exist")
    try:
        found = runpy.run_path(str(path))
    except ANY_ERROR as error:
        raise ConfigError(f"--space {path}: {named_line(error)}") from error
    grid, ranges = found.get("GRID", []), found.get("SEARCH", {})
    if all(isinstance(given, Sequence | Mapping) and not given for given in (grid, ranges)):
        raise ConfigError(f"--space {path} has neither GRID nor SEARCH")
    if isinstance(grid, Mapping):
        bare = next((name for name, values in grid.items() if not isinstance(values, list) or not values), None)
        if bare is not None:
            raise ConfigError(f"--space {path}: GRID gives no list of values for {bare}")
        grid = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not isinstance(grid, Sequence) or not all(isinstance(point, Mapping) and point for point in grid):
        raise ConfigError(f"--space {path}: GRID must be a list of points, or lists of values by name")
    if not isinstance(ranges, Mapping) or not all(_is_range(values) for values in ranges.values()):
        raise ConfigError(
            f"--space {path}: SEARCH must give (low, high), (low, high, 'log') above 0, or a list of values by name"
        )
    names = [name for settings in (*grid, ranges) for name in settings]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"--space {path}: names of settings must be texts")
    if any(set(point) != set(grid[0]) for point in grid):
        raise ConfigError(f"--space {path}: every point of GRID must give the same settings")
    return Space(path.stem, tuple(grid), dict(ranges))


def _is_range(values: Any) -> bool:
    if isinstance(values, tuple):
        ends, log = values[:2], values[2:]
        numbers = len(ends) == 2 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in ends)
        numbers = numbers and ends[0] < ends[1]
        return numbers and (log == () or (log == (LOG,) and ends[0] > 0))
    return isinstance(values, list) and bool(values)


def fitted(space: Space, run: RunConfig, search: bool) -> Space:
    """What of the space is wanted, its ranges or its points, each once, as ``run`` would hold them (0 becomes 0.0
    where a setting is a fraction).

    Raises ConfigError unless every point, or every end of a range, is a setting that ``run`` can have.
    """
    wanted = Space(space.name, () if search else space.points, space.ranges if search else {})
    if not wanted.varied:
        missing, hint = ("SEARCH", "leave out") if search else ("GRID", "give")
        raise ConfigError(f"--space {space.name} has no {missing}; {hint} --search")
    decides = flatten(run.identity)
    for name in wanted.varied:
        if name not in decides or name == "seed":
            known = ", ".join(n for n in decides if n.split(".")[0] == name.split(".")[0] and n != "seed")
            hint = f"; there are {known}" if known else ""
            raise ConfigError(f"--space {space.name} varies {name}, which is no setting that decides results{hint}")

    def held(settings: Settings) -> Settings:
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}  # NumPy's
        try:
            found = flatten(to_dict(with_values(run, plain)))
        except ConfigError as error:
            raise ConfigError(f"--space {space.name}: {error}") from error
        return {name: found[name] for name in settings}

    made = mapped(wanted, held)
    unread = next((name for name in made.varied if _is_unread(name, made, run)), None)
    if unread is not None:
        raise ConfigError(
            f"--space {space.name} varies {unread}, which nothing in this run reads: all points are one run"
        )
    return made


def _is_unread(name: str, space: Space, run: RunConfig) -> bool:
    """Whether all values that the space gives to a setting make the same run, whatever it gives to the others."""
    points = [*space.points, *corners(space.ranges)]
    values = {digest(point[name]): point[name] for point in points if name in point}.values()

    def made(settings: Settings) -> str:
        try:
            return digest(varied(run, settings).identity)
        except ConfigError as error:  # not with each value, then
            return str(error)

    others = ({other: value for other, value in point.items() if other != name} for point in points)
    each_once = {digest(settings): settings for settings in others}.values()
    several = ({made({**settings, name: value}) for value in values} for settings in each_once)
    return len(values) > 1 and all(len(found) == 1 for found in several)


def mapped(space: Space, held: Callable[[Settings], Settings]) -> Space:
    """The space with every point, and every end or value of a range, as ``held`` makes it; equal points are one."""
    points = {digest(point): point for point in map(held, space.points)}
    ranges: dict[str, Range] = {}
    for name, values in space.ranges.items():
        made = [held(point)[name] for point in corners({name: values})]
        ranges[name] = made if isinstance(values, list) else (made[0], made[1], *values[2:])
    return Space(space.name, tuple(points.values()), ranges)


def corners(ranges: Mapping[str, Range]) -> list[Settings]:
    """Every end or value of every range, one setting at a time."""
    return [
        {name: value}
        for name, values in ranges.items()
        for value in (values if isinstance(values, list) else values[:2])
    ]


def settings_text(settings: Settings) -> str:
    """Settings in a few words: ``alpha 2, ratio 0.5``."""
    return ", ".join(f"{name.rpartition('.')[2]} {short(value)}" for name, value in settings.items())
