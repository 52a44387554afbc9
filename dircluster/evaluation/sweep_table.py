"""What a sweep found: its trials, gathered by point, in a table and a figure (Figure 6a, section 4.3, Table 5)."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dircluster.config import digest, short
from dircluster.evaluation.figures import drawing
from dircluster.evaluation.results import own_rows, strongest
from dircluster.evaluation.versions import UNKNOWN, short_version

KINDS: tuple[Literal["natural", "robust"], ...] = ("natural", "robust")
PAPER = "paper (PGD-20)"


@dataclass(frozen=True)
class Trial:
    """One training of a sweep. Accuracies are shares of images, None where it did not come so far."""

    settings: Mapping[str, Any]
    """What varies, by name."""
    seed: int
    status: Literal["FINISHED", "STOPPED", "FAILED"]
    """STOPPED: early, because others were ahead."""
    held_out: float | None = None
    """Robust accuracy on held-out images, by which the best is chosen."""
    natural: float | None = None
    """Accuracy of the defense on natural test images, masks fresh."""
    robust: float | None = None
    """The lowest accuracy of the defense under any attack of the suite that knows it, see :func:`accuracies`."""
    bare: tuple[float, float] | None = None
    """The same two of the bare target."""
    seconds: float = 0.0
    """From the start of its last attempt to its end."""
    checkpoint: str = ""
    error: str = ""
    marked: bool = False
    """Whether the row that leaves least is marked: its accuracy is no evidence."""
    versions: list[str] = field(default_factory=list)
    """Of the code that trained and judged it; empty where none was recorded."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over seeds; the deviation is NaN for one."""

    mean: float
    deviation: float
    n: int

    def percent(self) -> str:
        """``76.2 ± 3.1`` or ``76.2``."""
        plain = f"{100 * self.mean:.1f}"
        return plain if math.isnan(self.deviation) else f"{plain} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True)
class Point:
    """All seeds of one setting."""

    settings: Mapping[str, Any]
    trials: tuple[Trial, ...]

    def spread(self, name: Literal["held_out", "natural", "robust"]) -> Spread | None:
        """Over the finished trials; None without any."""
        values = [v for t in self.trials if t.status == "FINISHED" and (v := getattr(t, name)) is not None]
        if not values:
            return None
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))

    @property
    def versions(self) -> list[str]:
        """Of the code that its finished trials come from, each once."""
        finished = (trial.versions or (UNKNOWN,) for trial in self.trials if trial.status == "FINISHED")
        return list(dict.fromkeys(version for versions in finished for version in versions))


def accuracies(rows: Iterable[Mapping[str, Any]], defense: str, norm: str) -> tuple[float, float, bool] | None:
    """Natural and robust accuracy of ``defense`` in a table of results, and whether the row of the second is marked.

    Natural is that of fresh masks where masks there are; robust is the lowest of all attacks in the ball of ``norm``
    that count against the defense (see results.strongest), but transfers. None where it has no such rows.
    """
    own = own_rows(rows, defense)
    natural = [row["accuracy"] for row in own if row["attack"] == "natural" and row["randomness"] != "fixed"]
    worst = strongest((row for row in own if not row["attack"].startswith("transfer")), norm)
    return (natural[0], worst["accuracy"], bool(worst.get("marks"))) if natural and worst else None


def by_point(trials: Iterable[Trial]) -> list[Point]:
    """Trials with equal settings together, in the order in which settings first appear."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(digest(dict(trial.settings)), []).append(trial)
    return [Point(group[0].settings, tuple(sorted(group, key=lambda t: t.seed))) for group in found.values()]


def best(points: Sequence[Point]) -> Point | None:
    """The point of the highest mean held-out robust accuracy, of those with most finished seeds; None without any."""
    judged = [(spread.n, spread.mean, point) for point in points if (spread := point.spread("held_out")) is not None]
    return max(judged, key=lambda found: found[:2])[2] if judged else None


def table(
    points: Sequence[Point], published: Callable[[Mapping[str, Any]], tuple[float, float] | None]
) -> list[dict[str, str]]:
    """A line a point, as text by column; the paper's numbers, natural and under PGD-20, where it prints some.

    Where the trials come from more than one version of the code, a column says from which: it may be what differs.
    """
    lines, winner = [], best(points)
    mixed = len({version for point in points for version in point.versions}) > 1
    for point in points:
        line = {name: short(value) for name, value in point.settings.items()}
        for column, name in (("held-out", "held_out"), ("natural", "natural"), ("robust", "robust")):
            spread = point.spread(name)  # type: ignore[arg-type]
            line[column] = "" if spread is None else spread.percent()
        line["robust"] += " !" if line["robust"] and any(trial.marked for trial in point.trials) else ""
        printed = published(point.settings)
        line[PAPER] = "" if printed is None else f"{printed[0]:.2f} / {printed[1]:.2f}"
        count = Counter(trial.status for trial in point.trials)
        others = [f"{count[status]} {status.lower()}" for status in ("STOPPED", "FAILED") if count[status]]
        line["seeds"] = ", ".join([str(count["FINISHED"]), *others])
        line["seconds"] = f"{sum(trial.seconds for trial in point.trials):.0f}"
        if mixed:
            line["code"] = ", ".join(map(short_version, point.versions))
        line["best"] = "best" if point is winner else ""
        lines.append(line)
    silent = not any(line[PAPER] for line in lines)
    return [{name: text for name, text in line.items() if name != PAPER or not silent} for line in lines]


def figure(points: Sequence[Point]) -> bytes:
    """PNG: curves with a point a seed over one number (Figure 6a), bars over few values, a grid over two whole numbers.

    Points without a finished trial are left out; raises ValueError where none has one.
    """
    judged = [point for point in points if point.spread("robust") is not None]
    if not judged:
        raise ValueError("no trial has finished")
    names = list(judged[0].settings)
    values = [tuple(point.settings.values()) for point in judged]

    def grids(axes: Any) -> None:
        for axis, kind in zip(axes, KINDS, strict=True):
            _grid(axis, judged, names, kind)

    if len(names) == 2 and all(isinstance(v, int) for pair in values for v in pair):
        return drawing(grids, 9, 3.6, 2)
    if (
        len(names) == 1
        and len(judged) > 4
        and all(isinstance(v, int | float) and not isinstance(v, bool) for (v,) in values)
    ):
        return drawing(lambda axes: _curves(axes[0], judged, names[0]), 6, 4)
    return drawing(lambda axes: _bars(axes[0], judged), max(5.0, 0.6 * len(judged)), 4)


def _heights(points: Sequence[Point], kind: Literal["natural", "robust"]) -> tuple[list[float], list[float]]:
    spreads = [spread for point in points if (spread := point.spread(kind)) is not None]
    return [100 * s.mean for s in spreads], [0.0 if math.isnan(s.deviation) else 100 * s.deviation for s in spreads]


def _target_lines(axis: Any, points: Sequence[Point]) -> None:
    bare = [trial.bare for point in points for trial in point.trials if trial.bare is not None]
    for index, (kind, color) in enumerate(zip(KINDS, ("C0", "C1"), strict=True)):
        if bare:
            mean = 100 * statistics.fmean(pair[index] for pair in bare)
            axis.axhline(mean, linestyle="--", color=color, linewidth=1, label=f"bare target, {kind}")


def _curves(axis: Any, points: Sequence[Point], name: str) -> None:
    ordered = sorted(points, key=lambda point: float(point.settings[name]))
    x = [point.settings[name] for point in ordered]
    for kind, color in zip(KINDS, ("C0", "C1"), strict=True):
        axis.plot(x, _heights(ordered, kind)[0], marker="o", markersize=4, color=color, label=kind)
        seeds = [(value, trial) for value, point in zip(x, ordered, strict=True) for trial in point.trials]
        found = [(value, 100 * share) for value, trial in seeds if (share := getattr(trial, kind)) is not None]
        if len(found) > len(ordered):  # a deviation says nothing of seeds of which some collapsed
            axis.scatter(*zip(*found, strict=True), s=14, marker="x", color=color, label=f"{kind}, each seed")
    _target_lines(axis, points)
    axis.set(xlabel=name, ylabel="accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()


def _bars(axis: Any, points: Sequence[Point]) -> None:
    for index, (kind, color) in enumerate(zip(KINDS, ("C0", "C1"), strict=True)):
        heights, deviations = _heights(points, kind)
        x = [number + 0.4 * index - 0.2 for number in range(len(points))]
        axis.bar(x, heights, 0.38, yerr=deviations, capsize=3, color=color, label=kind)
    _target_lines(axis, points)
    words = [
        "\n".join(f"{name.rpartition('.')[2]} {short(value)}" for name, value in p.settings.items()) for p in points
    ]
    axis.set_xticks(range(len(points)), words, fontsize=8)
    axis.set(ylabel="accuracy, %", ylim=(0, 119))
    axis.legend(ncols=2, fontsize=8)


def _grid(axis: Any, points: Sequence[Point], names: Sequence[str], kind: Literal["natural", "robust"]) -> None:
    rows, columns = (sorted({point.settings[name] for point in points}) for name in names)
    heights, _ = _heights(points, kind)
    cells = [[math.nan] * len(columns) for _ in rows]
    for point, height in zip(points, heights, strict=True):
        row, column = rows.index(point.settings[names[0]]), columns.index(point.settings[names[1]])
        cells[row][column] = height
        spread = point.spread(kind)
        assert spread is not None
        axis.text(column, row, spread.percent(), ha="center", va="center", fontsize=9)
    low, high = min(heights) - 5, max(heights) + 5  # or tenths of a point would look like much, the lowest like none
    axis.imshow(cells, cmap="Blues", aspect="auto", alpha=0.6, vmin=low, vmax=high)
    axis.set_xticks(range(len(columns)), [str(value) for value in columns])
    axis.set_yticks(range(len(rows)), [str(value) for value in rows])
    axis.set(xlabel=names[1], ylabel=names[0], title=f"{kind}, %")
