"""Every system's smoke twin from training to a sweep over its own settings: here, and submitted to a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

import dircluster
from dircluster.defenses.base import Defended
from dircluster.defenses.table import DEFENSES
from dircluster.reproduction.exhibits import LABELS
from dircluster.reproduction.plan import preset_of
from infra.local_cluster import BUCKET
from tests.jobs import Outcome, run_job


@dataclass(frozen=True)
class System:
    """What a system is swept over, and how it is attacked."""

    setting: str
    values: list[Any]
    known: str = ""
    """An attack that knows what it draws; empty where it draws nothing."""


SYSTEMS = {
    "identity": System("attack.steps", [1, 2]),  # it has no settings of its own
    "finetune": System("finetune.epochs", [1, 2]),
    "apegan": System("apegan.content", ["rmse", "mse"]),
    "apegan_a": System("adversarial.objective", ["own", "ce"]),
    "hgd": System("hgd.guidance", ["feature", "logit"]),
    "hgd_a": System("adversarial.objective", ["own", "ce"]),
    "nrp": System("nrp.samples", ["target", "ssp"]),
    "nrp_a": System("adversarial.epochs", [1, 2]),
    "jatp": System("jatp.layer", ["pooled", "map"]),
    "dir": System("dir.alpha", [0.0, 2.0], "masked2"),
    "menet": System("model.method", ["usvt", "soft_impute"], "projector2-eot2"),
    "menet_a": System("menet.lowest", [0.4, 0.5], "bpda2-eot2"),
    "ebm": System("model.steps", [2, 3], "full-gradient2-eot2"),
}
HERE = ("nrp_a", "ebm")
"""Of what the others are made of, in tests that CI runs: three stages, two networks and two updates a step; draws."""
LOCAL = ("--launcher", "local", "--scaling.device", "cpu", "--scaling.threads", "1")
LONG = (pytest.mark.slow, pytest.mark.timeout(1800))


@dataclass(frozen=True)
class Place:
    """Where jobs run: a job and its words -> how it ended."""

    run: Callable[..., Outcome]
    records: Callable[[], MlflowClient]
    experiment: str
    """Of their records, and of no others."""
    sweeps: bool
    """Whether sweeps are run too: each starts Ray, which takes half a minute where no cluster runs."""


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """This process, or a cluster that jobs are submitted to."""
    experiment = f"systems-{request.node.callspec.params['system']}"
    kept = ("--tracking.experiment", experiment)
    if request.param == "here":

        def run(script: str, *words: str) -> Outcome:
            return run_job(script, *words, *kept, *LOCAL, folder=tmp_path)

        records = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
        return Place(run, lambda: MlflowClient(records), experiment, sweeps=False)

    cluster, submit = request.getfixturevalue("cluster"), request.getfixturevalue("submit")
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    kept += ("--storage.uri", f"s3://{BUCKET}/{experiment}")

    def submitted(script: str, *words: str) -> Outcome:
        summary = tmp_path / "summary.json"
        summary.unlink(missing_ok=True)
        done = submit(*words, *kept, "--summary", str(summary), script=f"jobs/{script}.py")
        found = json.loads(summary.read_text()) if summary.exists() else {}
        return Outcome(done.returncode, done.stdout, done.stderr, found)

    return Place(submitted, MlflowClient, experiment, sweeps=True)


@pytest.mark.parametrize(
    ("system", "place"),
    [
        *((system, "here") for system in HERE),
        *(pytest.param(system, "submitted", marks=LONG) for system in SYSTEMS),
    ],
    indirect=["place"],
)
def test_a_system_is_trained_stored_loaded_judged_recorded_and_swept(system: str, place: Place, tmp_path: Path) -> None:
    known = SYSTEMS[system].known
    preset, name = preset_of("digits_smoke", system), "menet" if system == "menet_a" else system  # of another threat
    done = place.run("train", preset)
    assert done.code == 0, done.out + done.err
    rows = done.summary["results"]
    faced = {(row["defense"], row["attack"], row["randomness"]) for row in rows}
    own = ("pgd2 fixed", "pgd2 fresh") if known else ("natural none", "pgd2 none", "transfer-pgd2 none")
    assert {("none", "natural", "none"), *((name, *each.split()) for each in own)} <= faced

    folder = done.summary["checkpoint"]
    must_answer(dircluster.load_defense(folder), name, draws=bool(known))

    judged = place.run("evaluate", preset, "--defense", folder)
    assert judged.code == 0, judged.out + judged.err
    assert "evaluation: reused from" in judged.out
    assert judged.summary["rows"] == rows
    if known:
        few = ("--suite", "paper", "--no-verdict", "--evaluation.images", "4", "--evaluation.queries", "5")
        judged = place.run("evaluate", preset, "--defense", folder, *few)
        assert judged.code == 0, judged.out + judged.err
        assert known in {row["attack"] for row in judged.summary["rows"]}

    again = place.run("train", preset)
    assert again.code == 0, again.out + again.err
    assert f"{name}: reused from" in again.out

    if place.sweeps:
        setting, values = SYSTEMS[system].setting, SYSTEMS[system].values
        (tmp_path / "space.py").write_text(f"GRID = {{{setting!r}: {values!r}}}\n")
        swept = place.run("tune", preset, "--space", str(tmp_path / "space.py"))
        assert swept.code == 0, swept.out + swept.err
        assert [trial["settings"] for trial in swept.summary["trials"]] == [{setting: value} for value in values]
        assert {trial["status"] for trial in swept.summary["trials"]} == {"FINISHED"}
    must_be_recorded(place.records(), place.experiment, rows)


def must_answer(defense: Defended, name: str, draws: bool) -> None:
    """Fail unless it is that defense, and an image's logits are its own, whatever it is judged with."""
    assert defense.name == name
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = defense.fixed(0) if draws else defense
        together, alone = answers(images), torch.cat([answers(image[None]) for image in images])
        assert torch.equal(defense(images), defense(images)) != draws
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)  # kernels add up one image in another order


def must_be_recorded(client: MlflowClient, name: str, rows: list[dict[str, Any]]) -> None:
    """Fail unless all runs of an experiment are finished, and one has the accuracies of these rows."""
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in found} == {"FINISHED"}
    accuracies = {f"test/{row['defense']}/{row['attack']}/{row['randomness']}": row["accuracy"] for row in rows}
    assert any(accuracies.items() <= run.data.metrics.items() for run in found)


def test_every_system_is_here() -> None:
    assert set(SYSTEMS) == {*LABELS} >= {*DEFENSES}
