"""What is refused before Ray and MLflow start: what names, footers and first images can tell, in one line."""

from __future__ import annotations

import dataclasses
import http.server
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from dircluster.cluster import preflight, storage
from dircluster.cluster.paths import with_absolute_paths
from dircluster.config import ConfigError, RunConfig, StorageConfig, with_values
from dircluster.defenses.table import find_defense
from dircluster.files import POINTER
from dircluster.presets import preset
from tests.pictures import png


def run_of(words: str = "", name: str = "digits_smoke") -> RunConfig:
    """A preset with settings: ``data.uri PATH target.uri PATH``."""
    names = words.split()
    values = [int(word) if word.isdigit() else word for word in names[1::2]]
    return with_absolute_paths(with_values(preset(name), dict(zip(names[::2], values, strict=True))))


def check(words: str = "") -> None:
    preflight.check(run_of(words))


def table(file: Path, labels: list[int], cell: bytes) -> None:
    pq.write_table(pa.table({"image": [cell] * len(labels), "label": labels}), file)


def folders(root: Path, classes: int) -> None:
    for number in range(classes):
        folder = root / "train" / f"{number:02}"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(png(side=8))


def data_of(make: Callable[[Path], None], folder: Path) -> str:
    place = folder / "data"
    place.mkdir()
    make(place)
    return f"data.uri {place}"


LABELS = [i % 10 for i in range(90)]
WRONG_DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda place: None, "holds neither parquet files nor images"),
    "a text": (lambda place: (place / "train.txt").write_text("x") and None, r"holds neither .* \(but train.txt\)"),
    "labels": (lambda place: table(place / "train.parquet", [*LABELS, 12], png(side=8)), "labels reach from 0 to 12"),
    "size": (lambda place: table(place / "train.parquet", LABELS, png(side=9)), "the images are 1x9x9"),
    "damage": (lambda place: table(place / "train.parquet", LABELS, b"\x89PNG"), r"train.parquet, row 0: an image can"),
    "footer": (lambda place: (place / "train.parquet").write_bytes(b"PAR1") and None, "cannot be read as parquet"),
    "classes": (lambda place: folders(place, 11), "there are 11 class folders, but data.classes is 10"),
    "few": (lambda place: folders(place, 10), "training.batch_size 16 is more than the 7 training images"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    make, message = WRONG_DATA[name]
    with pytest.raises(ConfigError, match=message) as refusal:
        check(data_of(make, tmp_path))
    assert "\n" not in str(refusal.value)


def test_data_that_can_be_used(tmp_path: Path) -> None:
    check(data_of(lambda place: table(place / "train.parquet", LABELS, png(side=8)), tmp_path))
    (tmp_path / "few").mkdir()
    few = data_of(lambda place: folders(place, 10), tmp_path / "few")
    preflight.check(run_of(few), trains=False)  # an evaluation


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("target.uri nowhere", "target.uri '.*nowhere' does not exist"),
        ("target.uri file:///nowhere/h.safetensors", "target.uri '/nowhere/h.safetensors' does not exist"),
        ("target.uri pointer.pt", "pointer.pt' is a pointer of Git LFS, not the file itself"),
        ("target.uri damaged.safetensors", "damaged.safetensors' is not a sound safetensors file"),
        ("target.uri empty.pt", "empty.pt' is empty"),
        ("target.uri folder", "folder' is an empty folder"),
        ("target.uri timm:resnet18x", "timm has no model 'resnet18x'"),
        ("target.uri timm:", "timm has no model ''"),
        ("target.architecture timm:vit_huge_patch1", "timm has no model 'vit_huge_patch1'"),
        ("target.architecture no_such_package.nets:make", "there is no module 'no_such_package'"),
        ("target.uri runs:/abc/model", "target.uri 'runs:/abc/model' is an address of no kind that is known here"),
        ("target.uri https://example.org/x.pt", "'https://example.org/x.pt' is an address of no kind .* give a file"),
        ("target.uri gs://bucket/x.pt", "is an address of no kind that is known here"),
        ("target.uri a:b.pt", "a:b.pt'"),
        ("storage.uri runs%20a", "storage.uri .* holds '%'"),
        ("storage.uri s3://bucket/a?b#c", "holds '#' and '[?]'"),
    ],
)
def test_targets_and_names_that_cannot_be(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "pointer.pt").write_bytes(POINTER + b"v1\noid sha256:00\nsize 9\n")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=message):
        check(words)


def test_targets_that_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    target = find_defense("dir").build(preset("digits_smoke"), "classifier")
    save_file(target.state_dict(), tmp_path / "h.safetensors")
    save_file(target.state_dict(), tmp_path / "h.pt")
    torch.save(target.state_dict(), tmp_path / "saved.safetensors")
    (tmp_path / "preflight_mine.py").write_text(
        "from torch import nn\n"
        "def make(classes, channels):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))\n"
    )
    for words in (
        *(
            "target.uri h.safetensors",
            "target.uri h.pt",
            "target.uri saved.safetensors",
            "target.uri zoo:digits-dir",
            "target.uri timm:resnet18.a1_in1k",
            "target.uri models:/dir-digits@champion",
        ),
        *(
            "target.architecture preflight_mine:make",
            "target.architecture timm:resnet18",
        ),
    ):
        check(words)


def given_target(changed: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """What saves changed weights of the target of digits_smoke."""
    network: Any = find_defense("dir").build(preset("digits_smoke"), "classifier")
    return lambda file: torch.save(changed(network.network.state_dict()), file)


WRONG_TARGETS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not fetched": (lambda file: file.write_bytes(POINTER + b"v1"), "is a pointer of Git LFS"),
    "junk": (lambda file: file.write_bytes(b"hello" * 30), "is not a sound safetensors file, nor one of torch.save"),
    "numbers": (
        given_target(lambda sd: {name: value * float("nan") for name, value in sd.items()}),
        "holds numbers that are not finite",
    ),
    "code": (given_target(lambda sd: torch.nn.Linear(2, 2)), "holds a pickled object"),
    "misfit": (given_target(lambda sd: {"x": torch.ones(2, 2)}), "does not fit the model: '0.bias' is missing"),
    "mean": (given_target(lambda sd: sd), "does not say how images are normalized"),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
@pytest.mark.parametrize("on_ray", [True, False])
def test_a_given_target_is_loaded_before_anything_starts(name: str, on_ray: bool, tmp_path: Path) -> None:
    make, message = WRONG_TARGETS[name]
    make(tmp_path / "h.pt")
    run = run_of(f"target.uri {tmp_path / 'h.pt'}")
    with pytest.raises(ConfigError, match=f"^target.uri '.*h.pt' {message}") as refusal:
        preflight.check(run, on_ray=on_ray)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("target.architecture os.path:join", "target.architecture 'os.path:join' raised TypeError"),
        ("target.architecture os.path:nothing", "target.architecture 'os.path:nothing' cannot be imported"),
        ("target.architecture torchvision.models:resnet18", "the target cannot take 1x8x8 images"),
        ("target.architecture timm:vit_tiny_patch16_224", "the target cannot take 1x8x8 images"),
        ("target.uri zoo:cifar10-dir", "does not fit"),
        ("model.width 2000000000", "the denoiser that the settings describe has more than"),
        ("model.encoder_depth 2000000000", "the denoiser that the settings describe has more than"),
        ("data.classes 2000000000", "but digits has 10 classes"),
    ],
)
def test_networks_that_cannot_be_are_refused_before_anything_starts(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        check(words)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "words", "network"),
    [
        ("digits_apegan_smoke", "training.microbatch 1", "discriminator"),
        ("digits_apegan_smoke", "training.microbatch 2 training.batch_size 5", "discriminator"),
        ("digits_smoke", "training.microbatch 1 target.architecture resnet18", "classifier"),
    ],
)
def test_an_image_alone_whose_maps_of_one_pixel_cannot_be_normalized(name: str, words: str, network: str) -> None:
    with pytest.raises(ConfigError, match=f"^training.microbatch . lets one image .* the {network} cannot") as refusal:
        preflight.check(run_of(words, name))
    assert "\n" not in str(refusal.value)
    preflight.check(run_of(words, name), trains=False)
    preflight.check(run_of("training.microbatch 1"))
    preflight.check(run_of("training.microbatch 2", name))


def test_switches_that_this_machine_cannot_fulfil_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"training.capture is on, .* captured here: it runs on the CPU"):
        check("training.capture on scaling.device cpu")
    with pytest.raises(ConfigError, match="workers 16 need as many GPUs, but this machine has"):
        check("scaling.workers 16 scaling.device gpu")
    with pytest.raises(ConfigError, match=r"^training\.fused must be auto or off for SGD with parallel\.strategy"):
        check("training.fused on parallel.strategy fsdp scaling.workers 2 target.optimizer.name sgd")
    check("training.fused on parallel.strategy fsdp target.optimizer.name sgd")
    check("training.fused on parallel.strategy fsdp scaling.workers 2")
    check("training.fused on scaling.workers 2 target.optimizer.name sgd")

    def missing(device: torch.device) -> None:
        raise ConfigError(f"no compiler for the {device.type}")

    monkeypatch.setattr("dircluster.training.switches.check_compiler", missing)
    run = run_of("scaling.device cpu")
    compiled = dataclasses.replace(run, training=dataclasses.replace(run.training, compile="on"))
    with pytest.raises(ConfigError, match="no compiler for the cpu"):
        preflight.check(compiled)
    preflight.check(compiled, trains=False)


def test_the_target_of_an_evaluation_is_loaded_there(tmp_path: Path) -> None:
    WRONG_TARGETS["junk"][0](tmp_path / "h.pt")
    preflight.check(run_of(f"target.uri {tmp_path / 'h.pt'}"), trains=False)


def test_paths_that_the_nodes_of_a_cluster_may_have_are_theirs_to_judge(
    monkeypatch: pytest.MonkeyPatch, head: Callable[..., int]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head(preflight.PING)}")
    check("data.uri /nowhere target.uri /nowhere/h.safetensors")
    check("target.architecture os.path:join")
    for words, message in (
        ("data.uri /nowhere", "/nowhere"),
        ("target.uri /nowhere/h.safetensors", "target.uri '/nowhere/h.safetensors' does not exist"),
        ("target.architecture nowhere:make", "target.architecture 'nowhere:make': there is no module 'nowhere'"),
        ("target.architecture os.path:join", "target.architecture 'os.path:join' raised TypeError"),
        ("training.capture on scaling.device cpu", "training.capture is on"),
    ):
        with pytest.raises(ConfigError, match=message):
            preflight.check(run_of(words), on_ray=False)  # which does not join the cluster


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """A gRPC server that knows one of Ray's calls, with its request: -> its port."""
    monkeypatch.setattr(preflight, "ANSWER", 60.0)  # on a machine however busy
    servers: list[grpc.Server] = []

    def serve(call: tuple[str, bytes], code: grpc.StatusCode = grpc.StatusCode.OK) -> int:
        method, wanted = call

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if request != wanted or code is not grpc.StatusCode.OK:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT if request != wanted else code, "")
            return b""

        service, name = method.strip("/").split("/")
        handlers = {name: grpc.unary_unary_rpc_method_handler(answer)}
        servers.append(grpc.server(ThreadPoolExecutor(1)))
        servers[-1].add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
        port: int = servers[-1].add_insecure_port("127.0.0.1:0")
        servers[-1].start()
        return port

    yield serve
    for server in servers:
        server.stop(None).wait()


SETTINGS = b"\0\0\6\4\0\0\0\0\0\0\3\0\0\0\x64"


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[Callable[[bytes], int]]:
    """A server that says so many bytes to whoever connects: -> its port."""
    servers: list[socket.socket] = []

    def serve(server: socket.socket, answer: bytes) -> None:
        try:
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(64)
                    connection.sendall(answer)
        except OSError:
            pass

    def listen(answer: bytes) -> int:
        servers.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=serve, args=(servers[-1], answer), daemon=True).start()
        return int(servers[-1].getsockname()[1])

    yield listen
    for server in servers:
        server.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", r"no address of a Ray cluster: .* \(an http:// address is the dashboard's"),
        ("https://user:secret@host", r"RAY_ADDRESS https://\.\.\.@host is no address"),
        ("head", "is no address of a Ray cluster: give HOST:PORT"),
        ("head:port", "is no address of a Ray cluster"),
        ("127.0.0.1:0", "no Ray cluster answers at RAY_ADDRESS 127.0.0.1:0"),
        ("127.0.0.1:99999", "no Ray cluster answers"),
        ("[::1]:1", "no Ray cluster answers"),
        ("ray://127.0.0.1:1", "no Ray cluster answers"),
    ],
)
def test_addresses_without_a_cluster(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        preflight.check_address(address)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_addresses_that_are_none(address: str) -> None:
    preflight.check_address(address)


def test_a_cluster_is_known_by_what_it_answers(head: Callable[..., int]) -> None:
    preflight.check_address(f"127.0.0.1:{head(preflight.PING)}")
    preflight.check_address(f"ray://127.0.0.1:{head(preflight.CLIENT_PING)}")
    preflight.check_address(f"127.0.0.1:{head(preflight.PING, grpc.StatusCode.UNAUTHENTICATED)}")  # it wants a token


def test_a_port_of_something_else_is_no_cluster(
    head: Callable[..., int], listener: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = [listener(answer) for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", SETTINGS)]
    for port in (*ports, head(preflight.CLIENT_PING), head(("/some.other/Service", b""))):
        with pytest.raises(ConfigError, match="what listens there is something else"):
            preflight.check_address(f"127.0.0.1:{port}")
    monkeypatch.setattr(preflight, "ANSWER", 0.5)
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(ConfigError, match="it accepts a connection, and says nothing"):
        preflight.check_address(f"127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("section", ["data", "target"])
def test_what_lies_in_object_storage_is_asked_for(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str, storage: StorageConfig, write: bool = False, name: str = "storage.uri") -> None:
        raise ConfigError(f"{name}: {uri} does not exist")

    monkeypatch.setattr(storage, "check_bucket", refuse)
    with pytest.raises(ConfigError, match=re.escape(f"{section}.uri: s3://bucket/nowhere does not exist")):
        check(f"{section}.uri s3://bucket/nowhere")


def test_endpoint_and_region_reach_what_speaks_s3_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    given = StorageConfig("s3://bucket/runs", endpoint="http://127.0.0.1:9000", region="here-1")
    storage.to_environment(given)
    for name in ("AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        assert os.environ[name] == given.endpoint
    assert os.environ["AWS_DEFAULT_REGION"] == "here-1"


def test_workers_are_told_the_endpoint_that_this_process_knows_from_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "here-1")
    kept = run_of("storage.uri s3://bucket/runs").storage
    assert (kept.endpoint, kept.region) == ("http://127.0.0.1:9000", "here-1")
    assert run_of().storage.endpoint is None


def test_a_named_set_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody listens there, and nobody else can
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/test_32x32.mat"
        monkeypatch.setitem(preflight.DOWNLOADS, "svhn", ("test_32x32.mat", url))
        with pytest.raises(ConfigError, match=r"torchvision could not fetch svhn: .*; give --data.uri PATH instead"):
            preflight.check_download("svhn", tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test_32x32.mat").touch()
    preflight.check_download("svhn", tmp_path / "data")
    preflight.check_download("digits", tmp_path / "data")


class EmptyBucket(http.server.BaseHTTPRequestHandler):
    """An S3 server that has nothing of any name."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def do_GET(self) -> None:
        listed = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(listed)))
        self.end_headers()
        self.wfile.write(listed)

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("section", ["data", "target"])
def test_a_server_is_asked_for_what_it_does_not_have(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyBucket)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    with pytest.raises(ConfigError, match=rf"^{section}.uri: s3://bucket/nowhere does not exist$"):
        check(f"{section}.uri s3://bucket/nowhere")
    server.shutdown()
    server.server_close()


def test_workers_that_nobody_would_start(monkeypatch: pytest.MonkeyPatch) -> None:
    run = preset("digits_smoke")
    for workers, refused in ((1, False), ("1:4", False), (2, True), ("2:4", True)):
        asked = dataclasses.replace(run, scaling=dataclasses.replace(run.scaling, workers=workers))
        preflight.check(asked)
        with pytest.raises(ConfigError, match=f"workers {workers} by torchrun") if refused else nullcontext():
            preflight.check(asked, on_ray=False)
        monkeypatch.setenv("RANK", "0")  # as torchrun does
        preflight.check(asked, on_ray=False)
        monkeypatch.delenv("RANK")
