"""Spaces: what files may hold, and what is refused before anything starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dircluster.cluster.sweeps.space import Space, corners, fitted, load_space, settings_text
from dircluster.config import ConfigError, with_values
from dircluster.presets import preset, run_to_plain

SPACES = Path(__file__).parents[4] / "tune_spaces"
DEPTHS = [(4, 1), (4, 2), (6, 1), (6, 2), (8, 2), (12, 4)]


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.py"
    file.write_text(text)
    return file


@pytest.mark.long
@pytest.mark.parametrize("name", ["cifar10", "digits"])
@pytest.mark.parametrize("file", sorted(SPACES.glob("*.py")), ids=lambda file: file.stem)
def test_spaces_of_the_paper_fit_every_preset(file: Path, name: str) -> None:
    space = load_space(file)
    for search in (False, True):
        fitted(space, preset(name), search)


def test_spaces_of_the_paper_are_those_of_the_paper() -> None:
    depth = load_space(SPACES / "depth.py")
    assert [tuple(point.values()) for point in depth.points] == DEPTHS
    assert [point["masking.ratio"] for point in load_space(SPACES / "mask_ratio.py").points] == [0.3, 0.5, 0.7]
    alphas = [point["dir.alpha"] for point in load_space(SPACES / "alpha.py").points]
    assert (min(alphas), max(alphas)) == (0, 5)
    assert 2.0 in alphas
    joint = load_space(SPACES / "joint.py")
    assert set(joint.varied) == {"dir.alpha", "masking.ratio", "model.encoder_depth", "model.decoder_depth"}
    assert len(joint.points) == 27


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has neither GRID nor SEARCH"),
        ("GRID = {'dir.alpha': 2}", "GRID gives no list of values for dir.alpha"),
        ("GRID = [1, 2]", "GRID must be a list of points"),
        ("import numpy\nGRID = numpy.arange(3)", "GRID must be a list of points"),
        ("import numpy\nSEARCH = numpy.arange(3)", "SEARCH must give (low, high)"),
        ("SEARCH = {'dir.alpha': (5, 0)}", "SEARCH must give (low, high)"),
        ("GRID = [{'dir.alpha': 0}, {'masking.ratio': 0.3}]", "every point of GRID must give the same settings"),
        ("GRID = {1: [2]}", "names of settings must be texts"),
        ("assert False", ": AssertionError"),
        ("raise SystemExit(3)", ": SystemExit: 3"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    ],
)
def test_files_that_are_no_space(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_space(written(tmp_path, text))
    with pytest.raises(ConfigError, match="does not exist"):
        load_space(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("text", "search", "message"),
    [
        ("GRID = {'dir.beta': [1]}", False, "varies dir.beta, which is no setting that decides results; there are"),
        ("GRID = {'scaling.workers': [1]}", False, "varies scaling.workers, which is no setting"),
        ("GRID = {'seed': [1]}", False, "varies seed, which is no setting"),
        ("GRID = {'masking.ratio': [50]}", False, "masking.ratio must lie in (0, 1), got 50; did you mean 0.5?"),
        ("GRID = {'model.encoder_depth': ['deep']}", False, "deep"),
        ("SEARCH = {'masking.ratio': (0.5, 1.0)}", True, "masking.ratio must lie in (0, 1), got 1"),
        ("SEARCH = {'masking.ratio': (0.5, 0.6)}", False, "has no GRID; give --search"),
        ("GRID = {'masking.ratio': [0.5]}", True, "has no SEARCH; leave out --search"),
        ("GRID = {'dir.alpha': [10**400]}", False, "DirConfig.alpha cannot be 1000"),
        ("SEARCH = {'dir.target_optimizer.lr': (0.01, 0.1)}", True, "varies dir.target_optimizer.lr, which nothing"),
        (
            "GRID = {'dir.alpha': [0, 1], 'evaluation.queries': [10, 20]}",
            False,
            "varies evaluation.queries, which nothing in this run reads: all points are one run",
        ),
    ],
)
def test_spaces_that_do_not_fit_are_one_line(tmp_path: Path, text: str, search: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        fitted(load_space(written(tmp_path, text)), preset("digits"), search)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "search", "shared"),
    [
        ("alpha", False, {"target": 0, "pretrain": 2}),  # a run for each seed, which makes the target on its way
        ("mask_ratio", False, {"target": 2, "pretrain": 0}),
        ("depth", False, {"target": 2, "pretrain": 0}),
        ("alpha", True, {"target": 0, "pretrain": 2}),
        ("joint", True, {"target": 2, "pretrain": 0}),
    ],
)
def test_stages_that_trials_share_are_trained_once(file: str, search: bool, shared: dict[str, int]) -> None:
    from dircluster.cluster.sweeps.sweep import shared_stages
    from dircluster.cluster.sweeps.trial import Plan

    plan, space = Plan(run_to_plain(preset("digits")), None, (0, 1), {}), load_space(SPACES / f"{file}.py")
    found = shared_stages(plan, fitted(space, preset("digits"), search))
    assert {until: len(tasks) for until, tasks in found} == shared
    assert all(task.until == until for until, tasks in found for task in tasks)


def test_points_are_held_as_the_config_holds_them_each_once(tmp_path: Path) -> None:
    text = "GRID = {'dir.alpha': [0, 2, 0.0]}\nSEARCH = {'dir.alpha': (0, 5), 'model.encoder_depth': [4, 8]}"
    space = load_space(written(tmp_path, text))
    grid, search = fitted(space, preset("digits"), search=False), fitted(space, preset("digits"), search=True)
    assert [repr(point["dir.alpha"]) for point in grid.points] == ["0.0", "2.0"]
    assert repr(search.ranges) == "{'dir.alpha': (0.0, 5.0), 'model.encoder_depth': [4, 8]}"
    assert (grid.varied, search.varied) == (["dir.alpha"], ["dir.alpha", "model.encoder_depth"])


def test_a_grid_of_numpy_s_numbers_is_one_of_numbers(tmp_path: Path) -> None:
    points = "{'model.encoder_depth': list(numpy.arange(4, 6)), 'dir.alpha': list(numpy.linspace(0, 1, 2))}"
    text = f"import numpy\nGRID = {points}"
    grid = fitted(load_space(written(tmp_path, text)), preset("digits"), search=False)
    assert repr(grid.points[-1]) == "{'model.encoder_depth': 5, 'dir.alpha': 1.0}"


def test_two_ends_are_another_space_than_two_values() -> None:
    ends, values = (Space("mine", (), {"model.encoder_depth": found}) for found in ((1, 12), [1, 12]))
    assert ends.plain != values.plain


def test_settings_are_told_in_a_few_words() -> None:
    assert settings_text({"dir.alpha": 2.0, "masking.ratio": 0.123456}) == "alpha 2, ratio 0.1235"


def test_a_range_may_be_one_of_orders_of_magnitude(tmp_path: Path) -> None:
    text = "SEARCH = {'dir.optimizer.lr': (1e-4, 1e-2, 'log'), 'model.encoder_depth': (1, 12, 'log')}"
    space = fitted(load_space(written(tmp_path, text)), preset("digits"), search=True)
    assert space.ranges == {"dir.optimizer.lr": (1e-4, 1e-2, "log"), "model.encoder_depth": (1, 12, "log")}
    assert corners(space.ranges)[:2] == [{"dir.optimizer.lr": 1e-4}, {"dir.optimizer.lr": 1e-2}]
    plain = Space("mine", (), {"dir.optimizer.lr": (1e-4, 1e-2)})
    assert plain.plain != Space("mine", (), {"dir.optimizer.lr": (1e-4, 1e-2, "log")}).plain


def test_a_setting_that_some_points_read_may_vary(tmp_path: Path) -> None:
    joint = "'dir.joint': [False, True], 'dir.target_optimizer.lr': [0.01, 0.1]"
    run = with_values(preset("digits"), {"pretrain.epochs": 0})
    assert len(fitted(load_space(written(tmp_path, f"GRID = {{{joint}}}")), run, search=False).points) == 4


@pytest.mark.parametrize(
    "ends", ["(0, 1, 'log')", "(-1.0, 1.0, 'log')", "(1, 2, 'lin')", "(2, 1, 'log')", "('log',)", "(False, True)"]
)
def test_ranges_that_have_no_orders_of_magnitude(ends: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SEARCH must give \(low, high\), \(low, high, 'log'\) above 0"):
        load_space(written(tmp_path, f"SEARCH = {{'dir.alpha': {ends}}}"))
