"""Figures of what was trained, here on networks that nobody trained; and what is left out where a system is missing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dircluster.config import ConfigError
from dircluster.data.split import Split
from dircluster.defenses.base import Defended, Purifier
from dircluster.defenses.table import find_defense
from dircluster.evaluation.figures import restoration
from dircluster.evaluation.victim import VictimModel
from dircluster.presets import preset
from dircluster.reproduction.cells import Cell, Found
from dircluster.reproduction.pictures import PICTURES, Scene, swept
from dircluster.reproduction.tables import exhibits

PNG = b"\x89PNG"


def untrained(name: str) -> Defended:
    run = preset(name)
    defense = find_defense(run.defense)
    return defense.defended(run, {part: defense.build(run, part) for part in (defense.purifier, "classifier")}).eval()


@pytest.fixture(scope="module")
def scene() -> Scene:
    names = {"identity": "identity_", "natural": "identity_", "dir": "", "hgd": "hgd_", "hgd_a": "hgd_a_"}
    defenses = {system: untrained(f"digits_{name}smoke") for system, name in names.items()}
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (16, 1, 8, 8), generator=generator, dtype=torch.uint8)
    test = Split(pixels, torch.randint(10, (16,), generator=generator))
    return Scene(defenses, test, preset("digits").attack, steps=1, seed=0)


@pytest.mark.parametrize("name", ["noise", "restored", "gallery"])
def test_figures_are_drawn(scene: Scene, name: str) -> None:
    assert PICTURES[name](scene).png.startswith(PNG)


class Half(Purifier):
    """Keeps a random half of the pixels, and shows it."""

    def draw(self, generator: torch.Generator, images: int) -> Tensor:
        return torch.rand((images, 1, 8, 8), generator=generator) < 0.5

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        assert draws is not None
        return images * draws

    def visible(self, images: Tensor, draws: Tensor | None) -> list[Tensor]:
        return [self(images, draws)]


def test_what_is_shown_of_masked_images_is_what_their_restoration_saw(scene: Scene) -> None:
    images, labels = scene.images(4)
    victim = VictimModel(Defended(Half(), scene.defenses["dir"].classifier), "half")
    rows, _ = restoration(victim, images, labels, scene.attack, 1, 0)
    assert torch.equal(rows["view 1"], rows["restored"])


def test_curves_are_numbers_too(scene: Scene) -> None:
    """Figure 2: the noise is whole at first and gone at the end, where accuracy is that on natural images."""
    drawn = PICTURES["noise"](scene)
    data = json.loads(json.dumps(drawn.data))
    assert data["images"] == 16
    assert data["attack"] == {"norm": "linf", "epsilon": 0.15, "steps": 1, "step_size": scene.attack.step_for(1)}
    assert data["discarded"] == pytest.approx([i / 10 for i in range(11)])
    curves = {f"{target}, {kind}" for target in ("standard AT", "natural") for kind in ("PGD", "MI-FGSM", "image")}
    assert set(data["accuracy"]) == set(data["interval"]) == curves
    images, labels = scene.images(16)
    for target, name in (("standard AT", "identity"), ("natural", "natural")):
        clean = (scene.defenses[name].classifier(images).argmax(1) == labels).double().mean().item()
        ends = [data["accuracy"][f"{target}, {kind}"] for kind in ("PGD", "MI-FGSM", "image")]
        assert [ends[0][-1], ends[1][-1], ends[2][0]] == [clean] * 3
        assert ends[0][0] <= clean
    low, high = data["interval"]["natural, PGD"][0]
    assert low <= data["accuracy"]["natural, PGD"][0] <= high
    assert [line[""] for line in drawn.table] == list(data["accuracy"])
    assert list(drawn.table[0])[1:] == [f"{10 * i} %" for i in range(11)]
    for line in drawn.table:
        assert line["30 %"] == f"{100 * data['accuracy'][line['']][3]:.1f}"
    assert "n = 16, 95 % intervals of ±" in drawn.reading


def test_an_embedding_leaves_the_threads_as_they_were() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    from dircluster.evaluation.figures import embedding

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        points = embedding(torch.rand(20, 1, 4, 4), 0)
        assert points is not None
        assert points.shape == (20, 2)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_an_embedding_is_points_too(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dircluster.evaluation.figures.embedding", lambda features, seed: features[:, :2])
    data = PICTURES["embedded"](scene).data
    assert data["labels"] == scene.test.labels.tolist()
    assert {name: len(points) for name, points in data["points"].items()} == {"HGD": 16, "DIR": 16}


def test_a_figure_says_what_it_lacks(scene: Scene) -> None:
    alone = replace(scene, defenses={"hgd": scene.defenses["hgd"]})
    with pytest.raises(ConfigError, match="dir was not trained"):
        PICTURES["restored"](alone)
    with pytest.raises(ConfigError, match="dir and hgd were not trained"):
        PICTURES["restored"](replace(scene, defenses={}))


@pytest.mark.parametrize("name", ["table5", "ratio", "fig6a", "fig6b"])
def test_cells_are_drawn_as_a_sweep(name: str) -> None:
    exhibit = exhibits("cifar10")[name]
    found = Found((0.5, 0.6), 100)
    cells = [[Cell(line.label, column, found) for column in exhibit.columns] for line in exhibit.lines]
    cells[-1] = [Cell(exhibit.lines[-1].label, column, error="failed") for column in exhibit.columns]
    assert swept(exhibit, cells).png.startswith(PNG)
