"""What is made of a sweep's trials: means and deviations, the best, the table, the figure."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from PIL import Image

from dircluster.config import with_values
from dircluster.evaluation.sweep_table import PAPER, Trial, accuracies, best, by_point, figure, table
from dircluster.presets import preset


def trial(value: Any, seed: int, robust: float, held_out: float, name: str = "dir.alpha", **more: Any) -> Trial:
    settings = value if isinstance(value, dict) else {name: value}
    return Trial(settings, seed, "FINISHED", held_out, 0.9, robust, (0.95, 0.5), 10.0, **more)


def row(defense: str, attack: str, masks: str, accuracy: float, epsilon: float, **more: Any) -> dict[str, Any]:
    return {
        "defense": defense,
        "attack": attack,
        "randomness": masks,
        "accuracy": accuracy,
        "epsilon": epsilon,
        "norm": "linf",
        "average": 1,
        **more,
    }


def test_seeds_of_a_point_give_mean_and_deviation() -> None:
    (point,) = by_point([trial(2.0, 1, 0.7, 0.6), trial(2.0, 0, 0.5, 0.8), Trial({"dir.alpha": 2.0}, 2, "FAILED")])
    spread = point.spread("robust")
    assert spread is not None
    assert (spread.mean, spread.n) == (pytest.approx(0.6), 2)
    assert spread.deviation == pytest.approx(math.sqrt(0.02))
    assert spread.percent() == "60.0 ± 14.1"
    assert [t.seed for t in point.trials] == [0, 1, 2]
    (line,) = table([point], lambda _: None)
    assert (line["dir.alpha"], line["robust"], line["seeds"]) == ("2", "60.0 ± 14.1", "2, 1 failed")
    assert PAPER not in line


def test_the_best_is_chosen_on_held_out_images_not_on_test_images() -> None:
    points = by_point([trial(0.0, 0, 0.9, 0.5), trial(2.0, 0, 0.6, 0.8), Trial({"dir.alpha": 5.0}, 0, "STOPPED", 0.9)])
    winner = best(points)
    assert winner is not None
    assert winner.settings == {"dir.alpha": 2.0}
    assert best(by_point([Trial({"dir.alpha": 5.0}, 0, "FAILED")])) is None


def test_a_point_whose_other_seeds_failed_is_not_the_best() -> None:
    lucky = [trial(5.0, 0, 0.9, 0.9), Trial({"dir.alpha": 5.0}, 1, "FAILED")]
    winner = best(by_point([*lucky, trial(2.0, 0, 0.6, 0.6), trial(2.0, 1, 0.6, 0.7)]))
    assert winner is not None
    assert winner.settings == {"dir.alpha": 2.0}


def test_robust_is_the_lowest_of_the_attacks_that_know_the_defense() -> None:
    rows = [
        row("none", "natural", "none", 0.95, 0.0),
        row("none", "pgd20", "none", 0.5, 0.1),
        row("dir", "natural", "fixed", 0.91, 0.0),
        row("dir", "natural", "fresh", 0.92, 0.0),
        row("dir", "pgd20", "fixed", 0.7, 0.1, marks=[{"kind": "ascent", "share": 0.5}]),
        row("dir", "pgd20", "fresh", 0.75, 0.1),
        row("dir", "transfer-pgd20", "fresh", 0.1, 0.1),
        row("dir", "restored20-from-natural", "fixed", 0.2, 0.1),  # another threat
        row("dir", "l2-pgd200", "fresh", 0.2, 0.5, norm="l2"),
        row("dir", "bpda40-mean-of-10", "fresh", 0.2, 0.1, average=10),  # another defense
        row("dir", "pgd20-wor10", "fresh", 0.2, 0.1, protocol="Wor.Rob(10)"),
    ]
    assert accuracies(rows, "dir", "linf") == (0.92, 0.7, True)
    assert accuracies(rows, "none", "linf") == (0.95, 0.5, False)
    assert accuracies(rows, "other", "linf") is None


def test_the_papers_numbers_stand_beside_ours_on_its_data() -> None:
    run = preset("cifar10")
    lines = table(
        by_point([trial(ratio, 0, 0.5, 0.5, "masking.ratio") for ratio in (0.3, 0.5, 0.6)]),
        lambda settings: with_values(run, settings).printed_ablation(),
    )
    assert [line[PAPER] for line in lines] == ["87.34 / 49.63", "85.11 / 54.27", ""]


def test_the_papers_numbers_are_those_of_its_settings_alone() -> None:
    run = preset("cifar10")
    anywhere = {"seed": 3, "data.uri": "/data", "evaluation.suite": "paper"}
    assert with_values(run, anywhere).printed_ablation() == (85.11, 54.27)
    assert preset("svhn").printed_ablation() == (90.79, 55.3)
    assert with_values(run, {"model.encoder_depth": 4}).printed_ablation() == (84.21, 49.97)
    assert with_values(run, {"model.decoder_depth": 4, "model.encoder_depth": 12}).printed_ablation() == (85.37, 54.32)
    assert with_values(run, {"model.encoder_depth": 4, "dir.alpha": 5.0}).printed_ablation() is None
    assert with_values(preset("svhn"), {"masking.ratio": 0.3}).printed_ablation() is None
    for name in ("cifar10_smoke", "cifar10_joint", "cifar10_fast", "svhn_smoke", "digits"):
        assert preset(name).printed_ablation() is None


@pytest.mark.parametrize(
    "settings",
    [
        [{"dir.alpha": value} for value in (0.0, 1.0, 2.0, 3.0, 5.0)],
        [{"masking.ratio": value} for value in (0.3, 0.5, 0.7)],
        [{"model.encoder_depth": e, "model.decoder_depth": d} for e, d in ((4, 1), (4, 2), (12, 4))],
        [{"dir.alpha": 0.5, "masking.ratio": 0.3, "model.encoder_depth": 4}],
        [{"target.objective": name, "dir.optimizer.milestones": [3, 4]} for name in ("at", "trades")],
    ],
    ids=["curve", "bars", "grid", "joint", "words"],
)
def test_every_kind_of_sweep_has_a_figure(settings: list[dict[str, Any]]) -> None:
    trials = [trial(point, seed, 0.5 + 0.01 * seed, 0.5) for point in settings for seed in (0, 1)]
    drawn = Image.open(io.BytesIO(figure(by_point([*trials, Trial(settings[0], 7, "FAILED")]))))
    drawn.load()
    assert min(drawn.size) > 200
    colors = drawn.convert("RGB").getcolors(1 << 24)
    assert colors is not None
    assert len(colors) > 20
    with pytest.raises(ValueError, match="no trial has finished"):
        figure(by_point([Trial(settings[0], 0, "FAILED")]))


def test_a_column_says_which_code_trials_come_from_where_it_is_not_one() -> None:
    new, old = "b" * 40, "a" * 40
    trials = [trial(0.0, 0, 0.9, 0.5, versions=[new]), trial(2.0, 0, 0.6, 0.8, versions=[old, new])]
    same = [trial(0.0, 0, 0.9, 0.5, versions=[new]), trial(2.0, 0, 0.6, 0.8, versions=[new])]
    before = [trial(0.0, 0, 0.9, 0.5, versions=[new]), trial(2.0, 0, 0.6, 0.8), Trial({"dir.alpha": 5.0}, 0, "FAILED")]

    def codes(found: list[Trial]) -> list[str | None]:
        return [line.get("code") for line in table(by_point(found), lambda settings: None)]

    assert codes(trials) == ["b" * 9, f"{'a' * 9}, {'b' * 9}"]
    assert codes(same) == [None, None]
    assert codes(before) == ["b" * 9, "unknown", ""]
