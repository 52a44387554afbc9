"""What tests share: real data where it is to be had, small real runs, one thread a process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would let the other processes of tests starve its workers

import torch

from dircluster.defenses.recipe import Batch, Recipe
from dircluster.distributed.parallel import Parallel
from dircluster.presets import preset
from dircluster.presets.dir import DirRun
from dircluster.rng import Stream
from infra.local_cluster import Cluster
from tests.jobs import FOREIGN, RAY, ROOT, Outcome, run_job

torch.set_num_threads(1)
for foreign in FOREIGN:  # a person's cluster and server are not those of tests that ask in this process
    os.environ.pop(foreign, None)
ALONE = Parallel(0, 1, torch.device("cpu"))
"""One worker, on the CPU."""
CLUSTER = tuple(f"tests/fault/test_{name}.py" for name in ("killed", "submitted", "sweep"))
"""Files whose tests share one cluster: a second one would cost half a minute and two gigabytes."""


def wait_until(holds: Callable[[], Any], seconds: float = 60) -> None:
    """Until something holds that another thread does."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``: a file is done by one process, and all files whose tests share the cluster by one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = str(super()._split_scope(nodeid))
            return "cluster" if file in CLUSTER else file

    return Files(config, log)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Weights and images that a test draws without a seed of its own are the same ones every time."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report() -> None:
    """So are those that a module of tests draws while it is imported."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """And those of a fixture that several tests share, whichever of them comes first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """CIFAR-10 and a piece of SVHN as parquet: the folder DIRCLUSTER_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("DIRCLUSTER_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "svhn").is_dir():
        pytest.skip(f"no parquet data in {folder}: set DIRCLUSTER_DATA to a folder with cifar10/ and svhn/")
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """S3, MLflow, a Ray head and two nodes of two CPUs."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)  # the nodes inherit them
    try:
        made.up()
        yield made
    finally:
        made.down()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def submit(cluster: Cluster) -> Callable[..., subprocess.CompletedProcess[str]]:
    """ray job submit of a job with these words, and options of the submission: -> how the command ended."""

    def run(
        *words: str, script: str = "jobs/train.py", options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", "submit", "--working-dir", ".", *options, "--", "python", script, *words]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | cluster.environment(), capture_output=True, text=True, timeout=600
        )

    return run


@pytest.fixture
def smoke(tmp_path: Path) -> DirRun:
    """The digits run that takes seconds, kept in a folder of the test's own and not recorded."""
    run = preset("digits_smoke")
    assert isinstance(run, DirRun)
    return dataclasses.replace(
        run,
        storage=dataclasses.replace(run.storage, uri=str(tmp_path / "runs"), checkpoint_every=1),
        tracking=dataclasses.replace(run.tracking, enabled=False),
        scaling=dataclasses.replace(run.scaling, device="cpu", threads=1),
    )


@dataclasses.dataclass(frozen=True)
class Trained:
    """A defense that was trained once for all tests that need one, in ``runs`` of a folder they must not change."""

    folder: Path
    done: Outcome

    @property
    def summary(self) -> dict[str, Any]:
        return self.done.summary

    @property
    def final(self) -> str:
        """The folder of its checkpoint."""
        return str(self.summary["checkpoint"])


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """jobs/train.py digits_smoke --launcher local, recorded in MLflow."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_job("train", "digits_smoke", "--launcher", "local", folder=folder)
    assert done.code == 0, done.err
    return Trained(folder, done)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Random images with what a recipe draws in a step: (recipe, n, channels, side) -> Batch."""

    def make(
        recipe: Recipe, n: int = 4, channels: int = 1, side: int = 8, classes: int = 10, dtype: Any = torch.float32
    ) -> Batch:
        generator = torch.Generator().manual_seed(n + 7 * side)
        images = torch.rand(n, channels, side, side, generator=generator)
        labels = torch.randint(classes, (n,), generator=generator)
        return recipe.batch(images, labels, Stream(0, 0, 0, n, slice(0, n), torch.device("cpu")))

    return make
