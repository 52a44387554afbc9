"""How a sweep ends whose trials are all known: nothing is trained, and Ray's part is a count of CPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from dircluster import cli
from dircluster.cluster.console import Terminal
from dircluster.cluster.sweeps import sweep as sweeps
from dircluster.cluster.sweeps.space import Space
from dircluster.cluster.sweeps.store import store
from dircluster.cluster.sweeps.sweep import Sweep
from dircluster.config import StoppedError, with_values
from dircluster.evaluation.sweep_table import Trial
from dircluster.presets.dir import DirRun


@pytest.fixture
def sweep(smoke: DirRun, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Of one point, which was trained before."""
    monkeypatch.setattr(sweeps, "join_cluster", lambda config, terminal: None)
    monkeypatch.setattr(sweeps.ray, "cluster_resources", lambda: {"CPU": 2.0})
    run = dataclasses.replace(smoke, tracking=dataclasses.replace(smoke.tracking, enabled=True))
    Path(run.storage.uri).mkdir()
    point = {"dir.alpha": 1.0}
    store(with_values(run, point), Trial(point, 0, "FINISHED", 0.5, 0.75, 0.25))
    return Sweep(cli.TuneJob("digits_smoke", run), run, Space("mine", (point,), {}), Terminal())


def status_of(sweep: Sweep) -> str:
    assert sweep.tracker is not None
    job = sweep.tracker.job
    return str(MlflowClient(job.uri).get_run(job.run_id).info.status)


def test_what_was_trained_before_is_shown_and_kept(sweep: Sweep) -> None:
    assert sweep.run() == 0
    assert status_of(sweep) == "FINISHED"
    assert {file.name for file in sweep.notes.folder.iterdir()} == {"best.txt", "best.yaml", "figure.png", "table.json"}


@pytest.mark.parametrize(
    ("there", "device"), [({"CPU": 2.0}, "cpu"), ({"CPU": 2.0, "GPU": 1.0}, "gpu")], ids=["without", "with"]
)
def test_all_trials_run_where_the_first_does(
    there: dict[str, float], device: str, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that begin while a node with GPUs is away."""
    monkeypatch.setattr(sweeps.ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(sweeps.nodes, "cores_each", lambda workers, kind: 1)
    sweep.config = with_values(sweep.config, {"scaling.device": "auto"})
    assert sweep.run() == 0
    assert sweep.plan.config["run"]["scaling"]["device"] == device


def test_a_sweep_without_held_out_accuracies_has_a_figure_and_no_best(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of EBM, whose stage judges nothing while it trains."""
    (point,) = sweep.points
    store(with_values(sweep.config, point), Trial(point, 0, "FINISHED", None, 0.75, 0.25))
    assert sweep.run() == 0
    assert {file.name for file in sweep.notes.folder.iterdir()} == {"figure.png", "table.json"}
    assert "best      none: " in capsys.readouterr().out


def test_a_search_that_has_ended_chooses_no_more(smoke: DirRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it chose a point twice: the same command, given again, trains nothing."""
    monkeypatch.setattr(sweeps, "join_cluster", lambda config, terminal: None)
    monkeypatch.setattr(sweeps.ray, "cluster_resources", lambda: {"CPU": 2.0})
    Path(smoke.storage.uri).mkdir()
    point, chosen = {"dir.alpha": 1.0}, []
    store(with_values(smoke, point), Trial(point, 0, "FINISHED", 0.5, 0.75, 0.25))
    monkeypatch.setattr(sweeps.Tuning, "search", lambda tuning, ranges, known, begun, points: chosen.append(begun) or 0)
    space = Space("mine", (), {"dir.alpha": (0.0, 5.0)})

    def search(points: int) -> Sweep:
        made = Sweep(cli.TuneJob("digits_smoke", smoke, search=True, points=points), smoke, space, Terminal())
        assert made.run() == 0
        return made

    began = search(3)
    for _ in range(3):
        began._begun(dict(point))
    search(3)
    search(5)
    assert chosen == [0, 3]


def test_a_search_goes_on_from_held_out_accuracies(smoke: DirRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from those on test images."""
    monkeypatch.setattr(sweeps.ray, "cluster_resources", lambda: {"CPU": 2.0})
    Path(smoke.storage.uri).mkdir()
    points, told = [{"dir.alpha": 1.0}, {"dir.alpha": 2.0}], list[object]()
    for point, held_out, robust in zip(points, (0.5, 0.4), (0.2, 0.3), strict=True):
        store(with_values(smoke, point), Trial(point, 0, "FINISHED", held_out, 0.75, robust))
    monkeypatch.setattr(sweeps.Tuning, "search", lambda tuning, ranges, known, *_: told.append(known) or 0)
    space = Space("mine", (), {"dir.alpha": (0.0, 5.0)})
    made = Sweep(cli.TuneJob("digits_smoke", smoke, search=True, points=3), smoke, space, Terminal())
    for number, point in enumerate(points):
        made.notes.add_point(number, point)
    made.plan = made._plan()
    assert made._train() == 0
    assert told == [[(points[0], 0.5), (points[1], 0.4)]]


def test_a_sweep_that_is_stopped_while_ray_starts_records_nothing(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "join_cluster", lambda config, terminal: setattr(terminal, "signal", 2))
    assert sweep.run() == 130
    assert sweep.tracker is None


def test_a_sweep_that_is_asked_twice_to_stop_was_killed(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> int:
        raise SystemExit(130)

    monkeypatch.setattr(sweep, "_train", leave)
    with pytest.raises(SystemExit):
        sweep.run()
    assert status_of(sweep) == "KILLED"


def test_a_sweep_whose_table_cannot_be_kept_has_not_finished(sweep: Sweep) -> None:
    sweep.notes.folder.parent.write_text("a file where the folder of all sweeps should be")
    with pytest.raises(StoppedError, match=r"the sweep stopped .*; the same command goes on") as stopped:
        sweep.run()
    assert stopped.value.exit_code == 1
    assert status_of(sweep) == "FAILED"
