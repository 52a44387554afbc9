"""Jobs that are submitted to a cluster: from upload to table, exit codes, stops, and secrets that stay secret."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient

from dircluster.cluster import storage
from dircluster.config import StorageConfig
from infra.local_cluster import BUCKET, Cluster
from infra.photo_shards import write_photos
from tests.jobs import RAY, ROOT, run_job

Make = Callable[..., Any]
OFTEN = ("--storage.checkpoint-every", "10")


def places(cluster: Cluster) -> Iterator[tuple[str, bytes]]:
    """Everything that the cluster stored or logged, by its place; not the files that hold the secrets themselves."""
    own = {"cluster.json", "aws-credentials", "ray-token", "mlflow.ini", "env", "mlflow-users.db"}
    for root in (cluster.folder, Path(cluster.facts["temporary"])):
        for folder, _, names in os.walk(root):  # which passes over what a living cluster removes meanwhile
            for file in (Path(folder) / name for name in names):
                if file.is_file() and not file.is_symlink() and (file.parent != cluster.folder or file.name not in own):
                    try:
                        blob = file.read_bytes()
                    except FileNotFoundError:
                        continue
                    yield str(file), blob
    files = storage.filesystem(StorageConfig())
    for path in files.find(BUCKET):
        yield path, files.cat_file(path)


def hold_no_secret(cluster: Cluster, *outputs: str) -> None:
    """Fail where a secret stands in ``outputs``, or in anything that the cluster stored or logged."""
    facts = cluster.facts
    canaries = [facts["key"], facts["secret"], facts["password"], (cluster.folder / "ray-token").read_text()]
    canaries.append("CANARY-IN-URI")
    searched = 0
    for place, blob in [*(("output", output.encode()) for output in outputs), *places(cluster)]:
        searched += 1
        for number, canary in enumerate(canaries):
            assert canary.encode() not in blob, f"secret {number} stands in {place}"
    assert searched > 100


@pytest.mark.timeout(1500)
def test_from_upload_past_a_killed_worker_to_table_and_no_secret_anywhere(
    cluster: Cluster, job: Make, submit: Any, unbroken: Any, tmp_path: Path
) -> None:
    long = ("--dir.epochs", "30", *OFTEN)
    run = job(*long, "--scaling.workers", "2", "--scaling.max-failures", "1").submit()
    run.end_past_killed_workers(1)
    assert "Accuracy on the test split" in run.said
    assert re.search("model     models:/dir-digits_smoke@(champion|candidate)", run.said)  # others were there first
    assert "succeeded" in run.said
    assert b"\r" not in run.log.read_bytes()  # lines, no redrawn bars
    assert run.weights() == unbroken(*long)
    run.must_have_one_whole_record(120)

    champion = ("--defense", "models:/dir-digits_smoke@champion", "--storage.uri", run.uri)
    judged = submit("digits_smoke", *champion, script="jobs/evaluate.py")
    assert judged.returncode == 0, judged.stdout[-3000:]
    assert re.search(r"report    s3://\S+\.html", judged.stdout)
    refused = submit("digits_smoke")
    assert refused.returncode == 1
    assert "exit code 2" in refused.stdout
    assert "error: storage.uri 'runs' would lie in a copy of the working directory" in refused.stdout

    plan = run_job("train", "digits_smoke", "--storage.uri", run.uri, "--dry-run", folder=tmp_path)
    assert plan.code == 0, plan.err
    typed = run_job("train", "--storage.uri", "s3://me:CANARY-IN-URI@bucket/x", folder=tmp_path)
    assert typed.code == 2
    hold_no_secret(cluster, run.said, *(o.stdout + o.stderr for o in (judged, refused)), plan.out, plan.err, typed.err)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crash_tells_no_secret(cluster: Cluster, job: Make) -> None:
    crashed = job("--scaling.workers", "2", "--dir.epochs", "60", "--scaling.max-failures", "0", *OFTEN).start()
    crashed.wait_for(0)
    os.kill(crashed.workers()[0].pid, signal.SIGKILL)
    assert crashed.end(120) == 1
    hold_no_secret(cluster, crashed.said)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_streamed_shards_in_object_storage(cluster: Cluster, submit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    shards = f"s3://{BUCKET}/photos"
    write_photos(storage.open_path(shards, StorageConfig()))
    words = ("--data.uri", shards, "--storage.uri", f"s3://{BUCKET}/shards", "--scaling.workers", "2")
    done = submit("imagenet_smoke", *words)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Accuracy on the test split" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stopped_job_commits_and_is_marked_killed(cluster: Cluster, submit: Any, job: Make) -> None:
    run = job()  # only to look at its storage
    words = [word for word in run.words if not word.startswith("--scaling")]
    submitted = submit(*words, "--dir.epochs", "2000", "--scaling.workers", "2", options=("--no-wait",))
    (name,) = re.findall(r"Job '(raysubmit_\w+)' submitted", submitted.stdout)
    deadline = time.monotonic() + 400
    while run.committed("target") == 0 or not list(run.storage.glob("pretrain-*/final/COMMIT")):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(5)
    environment = os.environ | cluster.environment()
    asked = subprocess.run([RAY, "job", "stop", name], env=environment, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 0, asked.stdout
    logs = subprocess.run([RAY, "job", "logs", name], env=environment, capture_output=True, text=True, timeout=200)
    assert "stopped by signal 15; resume with: python jobs/train.py digits_smoke" in logs.stdout
    assert run.committed() > 0
    client = MlflowClient(cluster.mlflow_url)
    experiment = client.get_experiment_by_name(run.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {r.info.status for r in runs if r.data.tags.get("dircluster.stage", "dir") == "dir"} == {"KILLED"}


@pytest.mark.timeout(1200)
def test_a_cluster_that_does_not_suit_is_one_line(job: Make, tmp_path: Path) -> None:
    small = job("--scaling.workers", "16", "--training.batch-size", "16").start()
    assert small.end(200) == 2
    assert "error: scaling.workers 16 need as many CPUs, but the cluster has 4;" in small.said.splitlines()[-1]

    copy = tmp_path / "older"
    sources = shutil.ignore_patterns("__pycache__")  # where other tests write meanwhile
    shutil.copytree(ROOT / "dircluster", copy / "dircluster", ignore=sources)
    shutil.copytree(ROOT / "jobs", copy / "jobs", ignore=sources)
    init = copy / "dircluster" / "__init__.py"
    init.write_text(re.sub('__version__ = ".*"', '__version__ = "0.0.9"', init.read_text()))
    environment = os.environ | small.cluster.environment()
    environment |= {"RAY_ADDRESS": small.cluster.gcs, "PYTHONPATH": str(copy)}
    words = [*small.words[:1], "--storage.uri", small.uri]
    older = subprocess.run(
        [sys.executable, str(copy / "jobs/train.py"), *words],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert older.returncode == 2, older.stderr
    (line,) = older.stderr.strip().splitlines()
    assert re.search(r"node 127\.\S+ runs dircluster 0\.1\.0 \(\w+\), this job is 0\.0\.9 \(\w+\); submit with", line)


def test_every_part_listens_on_loopback_and_refuses_strangers(cluster: Cluster) -> None:
    for url, code in {
        f"{cluster.dashboard_url}/api/jobs/": 401,
        f"{cluster.mlflow_url}/api/2.0/mlflow/experiments/get?experiment_id=0": 401,
        f"{cluster.s3_url}/{BUCKET}": 403,
    }.items():
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(url, timeout=60)
        assert refusal.value.code == code, url
    ports = {cluster.facts["dashboard"], cluster.facts["mlflow"], *cluster.facts["s3"]}
    listening = {}
    for process in cluster.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # Ray's workers come and go
            at = [c.laddr for c in process.net_connections() if c.status == "LISTEN"]
            listening |= {address.port: address.ip for address in at if address.port in ports}
    assert ports - set(cluster.facts["s3"][1:]) <= set(listening)
    assert set(listening.values()) == {"127.0.0.1"}
