"""What the room of Ray, MLflow and object storage makes of the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import requests

from dircluster import cluster
from dircluster.cluster.storage import temporary_folder

NOWHERE = "http://127.0.0.1:9"


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Hello) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_servers_on_this_machine_are_asked_past_a_proxy(
    name: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "example.com, localhost")
    monkeypatch.setenv(name, NOWHERE)
    with pytest.raises(requests.ConnectionError):
        requests.get(server, timeout=60)
    cluster._reach_this_machine()
    assert requests.get(server, timeout=60).status_code == 200
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.com,localhost,127.0.0.1,::1"


def test_without_a_proxy_nothing_is_said_of_any(root: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    code = "import os, dircluster.cluster; assert 'no_proxy' not in os.environ"
    subprocess.run([sys.executable, "-c", code], cwd=root, env=kept, check=True)


def test_a_temporary_folder_lasts_as_long_as_the_process(root: Path) -> None:
    code = "from dircluster.cluster.storage import *; f = temporary_folder(); (f / 'x').write_text(''); print(f)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).exists()
    assert temporary_folder().is_dir()


@pytest.mark.parametrize("address", ["", " ", " 127.0.0.1:6379 "])
def test_blanks_are_no_address_of_a_cluster(address: str, root: Path) -> None:
    code = f"import os, dircluster.cluster; assert os.environ['RAY_ADDRESS'] == {address.strip()!r}"
    subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | {"RAY_ADDRESS": address}, check=True)
