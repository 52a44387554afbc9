"""The figures of the paper, drawn from what was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.config import AttackConfig, ConfigError
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.evaluation import figures
from dircluster.evaluation.meeting import meet
from dircluster.evaluation.statistics import wilson_interval
from dircluster.evaluation.sweep_table import Point, Trial, figure
from dircluster.evaluation.victim import VictimModel
from dircluster.models.classifiers import pooled
from dircluster.reproduction.cells import Cell
from dircluster.reproduction.exhibits import DISCARDED, EMBEDDED, SHOWN, Exhibit


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows where no cell holds it."""

    png: bytes
    data: Mapping[str, Any] = field(default_factory=dict)
    """For JSON."""
    reading: str = ""
    """What the table is of."""
    table: Sequence[Mapping[str, str]] = ()
    """Curves in texts, a line each."""


@dataclass(frozen=True)
class Scene:
    """What figures are drawn from: finished defenses by system (``natural`` is None over a natural target), images."""

    defenses: Mapping[str, Defended]
    test: Split
    attack: AttackConfig
    steps: int
    seed: int

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first images (n, C, H, W) in [0, 1], and labels (n,)."""
        return self.test.pixels(slice(count)), self.test.labels[:count]

    def restored(self, name: str, count: int) -> dict[str, Tensor]:
        """Natural and white-box adversarial images of a defense, and what it restores them to."""
        images, labels = self.images(count)
        victim = VictimModel(self.defenses[name], name)
        meet(victim, images[:8], int(labels.max()))
        return figures.restoration(victim, images, labels, self.attack, self.steps, self.seed)[0]


def noise(scene: Scene) -> Picture:
    """Figure 2: accuracy while a share of the noise, or of the natural image, is discarded."""
    _need(scene, "identity")
    names = {"standard AT": "identity", "natural": "natural"}
    targets = {word: scene.defenses[name].classifier for word, name in names.items() if name in scene.defenses}
    images, labels = scene.images(DISCARDED)
    found = figures.discarded_noise(targets, images, labels, scene.attack, scene.steps, scene.seed)
    found |= {f"{word}, image": _discarded_image(t, images, labels, scene.seed) for word, t in targets.items()}
    return Picture(figures.draw_shares(found), *_curves(scene, found, len(labels)))


def _curves(
    scene: Scene, found: Mapping[str, Sequence[float]], images: int
) -> tuple[dict[str, Any], str, list[dict[str, str]]]:
    """Curves over figures.SHARES, shares of ``images``, as the data, the reading and the table of a Picture."""
    intervals = {name: [wilson_interval(v * images, images) for v in values] for name, values in found.items()}
    widest = max(high - low for each in intervals.values() for low, high in each) / 2
    attack = {"norm": scene.attack.norm, "epsilon": scene.attack.epsilon, "steps": scene.steps}
    data = {
        "images": images,
        "seed": scene.seed,
        "attack": {**attack, "step_size": scene.attack.step_for(scene.steps)},
        "discarded": figures.SHARES,
        "accuracy": found,
        "interval": intervals,
    }
    reading = (
        "Accuracy in %, by the share of the pixels that lose their noise (in the rows of images: of natural images,"
        f" that turn zero); n = {images}, 95 % intervals of ± {100 * widest:.1f} points at the most."
    )
    words = [f"{100 * share:.0f} %" for share in figures.SHARES]
    table = [
        {"": name, **dict(zip(words, (f"{100 * v:.1f}" for v in values), strict=True))}
        for name, values in found.items()
    ]
    return data, reading, table


def _discarded_image(target: nn.Module, images: Tensor, labels: Tensor, seed: int) -> list[float]:
    """Accuracy on natural images of which a share of the pixels is zero, a value for each of figures.SHARES."""
    order = torch.rand(len(images), 1, *images.shape[2:], generator=rng.generator(seed, "figure2"))
    with torch.no_grad():
        kept = (images * (order >= share) for share in figures.SHARES)
        return [(target(some).argmax(1) == labels).double().mean().item() for some in kept]


def restored(scene: Scene) -> Picture:
    """Figure 4: natural images, adversarial ones against DIR, and what HGD and DIR restore of each."""
    _need(scene, "dir", "hgd")
    dir_, hgd = scene.restored("dir", SHOWN), scene.restored("hgd", SHOWN)
    rows = {
        "natural": dir_["natural"],
        "by HGD": hgd["restored natural"],
        "by DIR": dir_["restored natural"],
        "against DIR": dir_["adversarial"],
        "by HGD ": _restore(scene, "hgd", dir_["adversarial"]),
        "by DIR ": dir_["restored"],
    }
    return Picture(figures.draw_images(rows))


def gallery(scene: Scene) -> Picture:
    """Figure 7: adversarial images against DIR and against HGD, and what DIR, HGD and HGD_A restore of them."""
    _need(scene, "dir", "hgd")
    rows: dict[str, Tensor] = {}
    for name, word in (("dir", "DIR"), ("hgd", "HGD")):
        own = scene.restored(name, SHOWN)
        rows |= {f"against {word}": own["adversarial"], f"by {word}": own["restored"]}
    if "hgd_a" in scene.defenses:
        rows["by HGD_A"] = _restore(scene, "hgd_a", rows["against HGD"])
    return Picture(figures.draw_images(rows))


def embedded(scene: Scene) -> Picture:
    """Figure 5: UMAP of the target's features of restored images under white-box PGD, HGD left, DIR right."""
    _need(scene, "dir", "hgd")
    _, labels = scene.images(EMBEDDED)
    panels = {}
    for name in ("hgd", "dir"):
        adversarial = scene.restored(name, EMBEDDED)["restored"]
        with torch.no_grad():
            features = pooled(scene.defenses[name].classifier)(adversarial)
        points = figures.embedding(features, scene.seed)
        if points is None:
            raise ConfigError("umap-learn is not installed (pip install umap-learn)")
        panels[name.upper()] = points

    def draw(axes: Any) -> None:
        for axis, (title, points) in zip(axes, panels.items(), strict=True):
            x, y = points.T.numpy()
            axis.scatter(x, y, c=labels.numpy(), cmap="tab10", s=12)
            axis.set(title=title, xticks=[], yticks=[])

    shown = {title: [[round(at, 4) for at in point] for point in points.tolist()] for title, points in panels.items()}
    data = {"images": len(labels), "seed": scene.seed, "labels": labels.tolist(), "points": shown}
    return Picture(figures.drawing(draw, 9, 4, 2), data)


PICTURES: dict[str, Callable[[Scene], Picture]] = {
    "noise": noise,
    "restored": restored,
    "gallery": gallery,
    "embedded": embedded,
}
"""By the names that exhibits give; each raises ConfigError where the scene lacks what it needs."""


def swept(exhibit: Exhibit, cells: Sequence[Sequence[Cell]]) -> Picture:
    """The figure that a sweep draws, of natural accuracy and that under the paper's attack.

    Raises ConfigError where nothing has come out.
    """
    found = {row[0].line: {cell.column: cell.found for cell in row} for row in cells}
    bare = found.get("None", {})
    pair = [each.mean if (each := bare.get(column)) else None for column in ("natural", "pgd20")]
    own = (pair[0], pair[1]) if pair[0] is not None and pair[1] is not None else None
    points = []
    varied = [line for line in exhibit.lines if line.system.settings]
    for line in varied or exhibit.lines:
        natural, robust = found[line.label].get("natural"), found[line.label].get("pgd20")
        if robust is None:
            continue
        settings = dict(line.system.settings) or {"defense": line.label}
        trials = [
            Trial(settings, seed, "FINISHED", None, natural.values[seed] if natural else None, value, own)
            for seed, value in enumerate(robust.values)
        ]
        points.append(Point(settings, tuple(trials)))
    if not points:
        raise ConfigError("no line has come out")
    return Picture(figure(points))


def _restore(scene: Scene, name: str, images: Tensor) -> Tensor:
    with torch.no_grad():
        return scene.defenses[name].fixed(scene.seed).restore(images)


def _need(scene: Scene, *names: str) -> None:
    missing = [name for name in names if name not in scene.defenses]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not trained")
