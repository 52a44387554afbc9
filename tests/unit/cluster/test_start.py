"""What starting a job costs: what it imports, what it refuses before it imports anything, and what goes on at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from dircluster import cli
from dircluster.cluster import preflight
from dircluster.cluster.commands.train import Launch
from dircluster.cluster.paths import with_absolute_paths
from dircluster.cluster.runtime import driver
from dircluster.cluster.runtime.lean_trainer import LeanTrainer
from dircluster.config import ConfigError
from tests.unit.cluster.conftest import Terminal

HEAVY = ("ray", "torch", "mlflow")
NEVER = ("matplotlib", "optuna", "sklearn", "timm", "torchvision", "umap")
"""What a digits run on Ray needs nowhere."""


def imported(code: str, names: tuple[str, ...], folder: Path) -> str:
    """The last line of stderr of a process that runs ``code`` in ``folder``: which of ``names`` it has imported."""
    tail = f"\nimport sys; print(sorted(set({names!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, cwd=folder, timeout=300, check=True
    )
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("where", ["data", "target"])
def test_a_path_that_does_not_exist_is_refused_before_anything_is_imported(where: str, tmp_path: Path) -> None:
    words = ["digits_smoke", f"--{where}.uri", "nowhere"]
    code = f"from dircluster.cluster.commands.train import main; assert main({words!r}) == 2"
    assert imported(code, HEAVY, tmp_path) == "[]"
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=rf"{where}.uri '.*nowhere' does not exist"):
        preflight.check(with_absolute_paths(cli.parse(cli.TrainJob, words).run))


@pytest.mark.long
def test_neither_driver_nor_worker_of_a_digits_run_imports_what_it_does_not_need(root: Path) -> None:
    code = (
        "from dircluster.cluster.runtime import driver, ray_train, ray_worker\n"
        "from dircluster.cluster.tracking import registry, tracker\n"
        "from dircluster.data.sources import load\n"
        "from dircluster.presets import preset\n"
        "load(preset('digits').data, 0)\n"
    )
    assert imported(code, NEVER, root) == "[]"


def test_ray_starts_before_torch_is_imported(root: Path) -> None:
    code = "import dircluster.cluster.console, dircluster.cluster.runtime.driver"
    assert imported(code, ("mlflow", "ray", "ray.train", "torch"), root) == "['ray']"


@pytest.mark.long
def test_neither_ray_trains_controller_nor_the_record_of_a_job_needs_torch(root: Path) -> None:
    code = "import dircluster.cluster.runtime.ray_train, dircluster.cluster.tracking.jobs"
    assert imported(code, ("ray.train", "torch"), root) == "['ray.train']"


@pytest.mark.long
def test_what_only_loads_and_classifies_needs_no_compiler(root: Path) -> None:
    code = (
        "import torch\n"
        "from dircluster import load_defense\n"
        "from dircluster.cluster.tracking import registry, tracker\n"
        "load_defense('zoo:cifar10-dir')(torch.zeros(1, 3, 32, 32))\n"
    )
    assert imported(code, ("torch", "torch._dynamo"), root) == "['torch']"


class Ray:
    """In place of the driver: a cluster whose start and end take as long as MLflow wants to see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, opened: threading.Event, registered: threading.Event) -> None:
        self.opened, self.registered = opened, registered
        self.asked: list[str] = []
        monkeypatch.setattr(driver, "train", self.train)

    def train(self, config: Any, owner: str, fresh: bool, record: Any, terminal: Any, on_outcome: Any) -> Any:
        self.asked.append("start")
        assert self.opened.wait(60), "the record is opened while Ray starts"
        record()
        outcome = {"status": "FINISHED"}
        on_outcome(outcome)
        assert self.registered.wait(60), "the model is registered while Ray ends"
        return outcome


def launch(*words: str) -> Launch:
    return Launch(cli.parse(cli.TrainJob, ["digits_smoke", *words]))


def test_mlflow_works_while_ray_starts_and_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: Terminal
) -> None:
    opened, registered = threading.Event(), threading.Event()
    ray, job = Ray(monkeypatch, opened, registered), launch("--storage.uri", str(tmp_path))
    monkeypatch.setattr(job, "_open_record", lambda terminal: opened.set())
    monkeypatch.setattr(job, "_register", lambda outcome, terminal: registered.set())
    with ThreadPoolExecutor(1) as aside:
        assert job._train(terminal, aside) == {"status": "FINISHED"}
    assert ray.asked == ["start"]


def test_ray_does_not_start_while_mlflow_may_still_refuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: Terminal
) -> None:
    words = ("--storage.uri", str(tmp_path), "--tracking.uri", "http://127.0.0.1:9")
    ray, job = Ray(monkeypatch, threading.Event(), threading.Event()), launch(*words)

    def refuse(terminal: Any) -> None:
        raise ConfigError("refused")

    monkeypatch.setattr(job, "_open_record", refuse)
    with ThreadPoolExecutor(1) as aside, pytest.raises(ConfigError, match="refused"):
        job._train(terminal, aside)
    assert ray.asked == []


def test_a_model_that_is_not_there_is_refused_before_anything_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: Terminal
) -> None:
    words = ("--storage.uri", str(tmp_path), "--target.uri", "models:/dir-digits@champion")
    ray, job = Ray(monkeypatch, threading.Event(), threading.Event()), launch(*words)
    with ThreadPoolExecutor(1) as aside, pytest.raises(ConfigError, match=r"there is no record .*mlflow.db"):
        job._train(terminal, aside)
    assert (ray.asked, list(tmp_path.iterdir())) == ([], [])


def test_a_signal_while_ray_starts_ends_the_run_before_workers_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: Terminal
) -> None:
    monkeypatch.setattr(driver, "join_cluster", lambda config, terminal: setattr(terminal, "signal", 2))
    monkeypatch.setattr(driver.ray, "shutdown", lambda: terminal.say("Ray is gone"))
    config = launch("--storage.uri", str(tmp_path)).config
    outcome = driver.train(config, "owner", False, lambda: None, terminal, lambda outcome: None)  # type: ignore[arg-type]
    assert outcome == {"status": "KILLED", "signal": 2}
    assert terminal.said == ["Ray is gone"]


def test_what_ray_starts_does_not_end_by_a_terminal_that_is_closed() -> None:
    words = ["sh", "-c", "kill -HUP $$; echo lives"]
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may have had it ignored
    try:
        with driver._children_do_not_hear(signal.SIGHUP):
            inside = subprocess.run(words, capture_output=True, text=True, check=False)
        outside = subprocess.run(words, capture_output=True, text=True, check=False)
    finally:
        signal.signal(signal.SIGHUP, usual)
    assert (inside.stdout, outside.stdout) == ("lives\n", "")


@pytest.mark.parametrize("alone", [True, False])
def test_ray_train_starts_no_helper_that_a_run_has_no_use_for(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        DataParallelTrainer, "_initialize_and_run_controller", lambda self, **named: given.update(named)
    )
    made = LeanTrainer(print, alone=alone, scaling_config=ScalingConfig(num_workers=2))
    of_ray = {type(one).__name__ for one in DataParallelTrainer._create_default_callbacks(made)}
    left = {type(one).__name__ for one in made._create_default_callbacks()}
    assert of_ray - left == {"DatasetsCallback", *(["PlacementGroupCleanerCallback"] if alone else [])}
    fixed = FixedScalingPolicy(made.scaling_config)
    made._initialize_and_run_controller(scaling_policy=fixed)
    assert (given["scaling_policy"] is fixed) == (not alone)
    if alone:
        given["scaling_policy"].after_controller_start(None)  # asks nobody: there is no Ray here
        assert given["scaling_policy"].make_decision_for_non_running_worker_group().num_workers == 2
    elastic = ElasticScalingPolicy(ScalingConfig(num_workers=(1, 4)))
    made._initialize_and_run_controller(scaling_policy=elastic)
    assert given["scaling_policy"] is elastic
