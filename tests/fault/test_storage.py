"""Storage that dies with the writer, refuses, stalls or is full: runs go on, and end in the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from s3fs import S3FileSystem

from dircluster.cluster import storage
from dircluster.cluster.commands import replay
from dircluster.config import ConfigError, DataConfig, StorageConfig, with_values
from dircluster.data.sources import load
from dircluster.data.stream import Shards, StreamLoader
from dircluster.presets import preset
from dircluster.training.locks import stage_lock
from infra.local_cluster import BUCKET, Cluster
from infra.photo_shards import write_photos
from tests.fault.conftest import SMOKE, weights_in
from tests.fault.kill_at import MOMENTS
from tests.jobs import ROOT, run_job

QUICK = (("before the marker", False),)
"""The moment that CI tries, in a folder; the rest, and object storage, are slow."""
ALONE = ("--launcher", "local", "--tracking.no-enabled", "--seed", "3")


class Train:
    """jobs/train.py on one local worker, and kill_at.py, which needs a process of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], uri: str) -> None:
        self.folder, self.uri = folder, uri
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.log = folder / "job.log"

    def start(self, *words: str, moment: str = "") -> subprocess.Popen[bytes]:
        script = [str(ROOT / "tests/fault/kill_at.py"), moment] if moment else [str(ROOT / "jobs/train.py")]
        command = [sys.executable, *script, *SMOKE, *ALONE, "--storage.uri", self.uri, "--summary", "summary.json"]
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [*command, *words],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment | {"PYTHONPATH": str(ROOT)},
            )

    def run(self, *words: str, moment: str = "") -> int:
        if moment:
            return self.start(*words, moment=moment).wait(300)
        S3FileSystem.clear_instance_cache()  # it remembers credentials
        words = (*SMOKE, *ALONE, "--storage.uri", self.uri, *words)
        done = run_job("train", *words, folder=self.folder, env=self.environment)
        self.log.write_text(done.out + done.err)
        S3FileSystem.clear_instance_cache()
        return done.code

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")  # a character may be half written

    def waits_for(self, text: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(text, self.said, re.MULTILINE):
            assert time.monotonic() < deadline, self.said[-2000:]
            time.sleep(0.1)

    def weights(self) -> dict[str, str]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return weights_in(storage.open_path(summary["checkpoint"], StorageConfig()))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Weights of the run that nothing happened to."""
    train = Train(tmp_path_factory.mktemp("reference"), {}, "runs")
    assert train.run() == 0, train.said
    return train.weights()


@pytest.fixture
def train(bucket: Path, tmp_path: Path) -> Train:
    return Train(tmp_path, {}, str(bucket))


@pytest.mark.parametrize(
    ("moment", "remote"),
    [
        pytest.param(moment, remote, marks=[] if (moment, remote) in QUICK else pytest.mark.slow)
        for moment in MOMENTS
        for remote in (False, True)
    ],
)
def test_killed_at_the_worst_moments(train: Train, reference: dict[str, str], moment: str, remote: bool) -> None:
    train.uri = train.uri if remote else "runs"
    words = ("--storage.checkpoint-every", "2")
    if moment == "loading":
        assert train.run(*words, moment="after the marker") == -9, train.said
    assert train.run(*words, moment=moment) == -9, train.said
    assert train.run(*words) == 0, train.said
    assert "Traceback" not in train.said
    (step,) = re.findall(r"dir: resuming at step (\d+)", train.said)
    assert int(step) == (4 if moment in ("after the marker", "loading") else 2)
    assert train.weights() == reference


class Proxy:
    """A TCP proxy before a server, which can refuse connections or fall silent."""

    def __init__(self, port: int) -> None:
        self.target, self.mode = port, "pass"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, mode: str) -> None:
        """refuse: close connections at once; stall: accept and say nothing; pass: as before."""
        self.mode = mode
        if mode == "refuse":
            for pair in self.pairs:
                for side in pair:
                    side.close()
            self.pairs.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            self.pairs.append((client, server))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                while self.mode == "stall":
                    time.sleep(0.1)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()


@pytest.fixture
def proxy(s3: Cluster) -> Iterator[Proxy]:
    made = Proxy(s3.facts["s3"][0])
    with closing(made.listener):
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["refuse", "stall"])
@pytest.mark.parametrize("seconds", [8, 60])
def test_an_outage_of_storage(train: Train, proxy: Proxy, unbroken: Any, mode: str, seconds: float) -> None:
    train.environment["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{proxy.port}"
    words = ("--dir.epochs", str(int(60 + 5 * seconds)), "--storage.checkpoint-every", "4")
    process = train.start(*words)
    train.waits_for("^dir  epoch 1/")
    time.sleep(1)
    before = train.said
    proxy.cut(mode)
    time.sleep(seconds)
    proxy.cut("pass")
    assert process.wait(700) == 0, train.said
    after = train.said.removeprefix(before)
    assert "cannot be stored" in after
    assert "storage takes checkpoints again" in after
    assert after.index("dir  epoch") < after.index("evaluation:")
    assert train.weights() == unbroken(*words)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(4096))


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, unbroken: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        train = Train(tmp_path, {}, str(disk / "runs"))
        words = ("--dir.epochs", "200", "--storage.checkpoint-every", "4")
        process = train.start(*words)
        train.waits_for("^dir  epoch 1/")
        filler = disk / "filler"
        fill(filler)
        train.waits_for("cannot be stored .*No space left on device")
        filler.unlink()
        assert process.wait(300) == 0, train.said
        assert "storage takes checkpoints again" in train.said
        assert train.weights() == unbroken(*words)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_one_job_holds_a_stage_in_object_storage(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dircluster.training.locks.BEAT", 0.2)
    monkeypatch.setattr("dircluster.training.locks.DEAD", 6.0)  # a beat may be late on a busy machine
    said: list[str] = []
    with stage_lock(bucket, "first", said.append) as check:
        with pytest.raises(ConfigError, match="another job is training"), stage_lock(bucket, "second", said.append):
            pass
        with stage_lock(bucket, "first", said.append):  # its own worker, restarted
            check()
    with stage_lock(bucket, "second", said.append):
        pass
    (bucket / "lease.json").write_text(json.dumps({"owner": "dead", "beat": 7}))
    with stage_lock(bucket, "third", said.append):
        remote: Any = bucket / "lease.json"
        assert json.loads(remote.fs.cat_file(remote.path))["owner"] == "third"

        def robbed() -> None:
            """Take it, again where a beat that was under way is written over the thief, and look."""
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                remote.write_text(json.dumps({"owner": "thief", "beat": 1}))
                check()

        with pytest.raises(ConfigError, match="another job is training"):
            robbed()
    assert "has not said goodbye" in said[0]


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"uri": "s3://no-such-bucket/runs"}, {}, "there is no bucket 'no-such-bucket' at http://127.0.0.1"),
        ({}, {"AWS_ACCESS_KEY_ID": "wrong", "AWS_SECRET_ACCESS_KEY": "wrong"}, "refuses the credentials at hand"),
        pytest.param(
            {"endpoint": "http://127.0.0.1:9"}, {}, "http://127.0.0.1:9 does not answer", marks=pytest.mark.slow
        ),
        ({"region": "eu-nowhere-1"}, {"AWS_ENDPOINT_URL_S3": ""}, "'eu-nowhere-1' is no region of AWS; did you mean"),
        pytest.param({}, {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}, "no credentials for S3", marks=pytest.mark.slow),
    ],
)
def test_storage_that_cannot_be_used_is_one_line_within_seconds(
    train: Train, settings: dict[str, str], environment: dict[str, str], message: str
) -> None:
    train.environment |= environment
    words = [word for name, value in settings.items() for word in (f"--storage.{name}", value)]
    began = time.monotonic()
    assert train.run(*words) == 2, train.said
    assert time.monotonic() - began < 60
    (line,) = train.said.strip().splitlines()
    assert line.startswith("error: storage.")
    assert message in line


def test_keys_that_lack_a_right_are_one_line_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, every = Cluster(tmp_path), ["Read", "Write", "List"]
    lacking = {"Write": "s3:PutObject", "List": "s3:ListBucket", "Read": "s3:GetObject", "": None}
    names = {store.facts["key"]: ["Admin"]} | {f"without{a}": [b for b in every if b != a] for a in lacking}
    keys = [{"accessKey": name, "secretKey": store.facts["secret"]} for name in names]
    known = [{"name": k["accessKey"], "credentials": [k], "actions": names[k["accessKey"]]} for k in keys]
    (tmp_path / "rights.json").write_text(json.dumps({"identities": known}))
    run = with_values(preset("digits_smoke"), {"storage.uri": f"s3://{BUCKET}/runs"})
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.facts["secret"])
    try:
        store.start_s3(options=(f"-s3.config={tmp_path}/rights.json",))
        for action, right in lacking.items():
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"without{action}")
            S3FileSystem.clear_instance_cache()
            with pytest.raises(ConfigError, match=f"{right}$") if right else contextlib.nullcontext():
                storage.check(run)
    finally:
        S3FileSystem.clear_instance_cache()
        store.down()


def test_a_report_in_object_storage_is_read_or_is_one_line_within_seconds(
    bucket: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bucket / "report.json"
    report.write_text((ROOT / "docs" / "claims" / "digits-dir.json").read_text())
    errors = []
    for words in ([str(report), "no/such/row"], [str(bucket / "absent.json"), "1"]):
        assert replay.main(words) == 2
        errors += capsys.readouterr().err.splitlines()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    began = time.monotonic()
    assert replay.main([str(report), "1"]) == 2
    assert time.monotonic() - began < 60
    errors += capsys.readouterr().err.splitlines()
    for part, line in zip(("no/such/row", "absent.json does not exist", "does not answer"), errors, strict=True):
        assert part in line


def test_the_folder_of_a_stage_is_not_storage(train: Train, bucket: Path) -> None:
    (bucket / "step-00000001" / "COMMIT").write_text("x")
    assert train.run() == 2
    assert "is the folder of one stage of another run" in train.said


def test_without_a_server_there_is_no_record_in_object_storage(train: Train) -> None:
    assert train.run("--tracking.enabled") == 2
    assert "tracking.uri is missing" in train.said


def test_shards_stream_from_object_storage(bucket: Path, tmp_path: Path) -> None:
    batches = []
    for folder in (bucket, tmp_path):
        write_photos(folder)
        config = DataConfig(
            name="custom", uri=str(folder), height=224, width=224, channels=3, classes=2, resize=True, stream=True
        )
        data = load(config, 0, open_path=storage.opener(StorageConfig()))
        assert isinstance(data.train, Shards)
        batches.append(StreamLoader(data.train, 16, 0, "t")(1, 2)[:2])
    for remote, here in zip(*batches, strict=True):
        assert torch.equal(remote, here)


def test_files_of_a_bucket_are_told_from_others_of_their_names(bucket: Path) -> None:
    found = []
    for content in (b"one", b"two", b"one"):
        (bucket / "data" / "train.parquet").write_bytes(content)
        storage.version.cache_clear()
        found.append(storage.version(str(bucket / "data"), StorageConfig()))
    assert found[0] == found[2] != found[1]
    assert storage.version(str(bucket / "data" / "train.parquet"), StorageConfig()) == found[2]
    for nothing in (str(bucket / "nothing"), "s3://no-such-bucket/data"):
        assert storage.version(nothing, StorageConfig()) == ""


def test_a_configs_storage_is_pickled_without_secrets(s3: Cluster, bucket: Path) -> None:
    import pickle

    run = preset("digits_smoke")
    blob = pickle.dumps(bucket) + pickle.dumps(run) + pickle.dumps(storage.filesystem(run.storage))
    assert s3.facts["secret"].encode() not in blob
    assert s3.facts["key"].encode() not in blob
    assert BUCKET.encode() in blob
