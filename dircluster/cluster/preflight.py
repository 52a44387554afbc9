"""What can be known of a run before Ray and MLflow start: in about a second, and without a trace.

What lies on this machine is looked at; of what lies in object storage it is asked whether it exists. Paths that only
the nodes of a cluster may have are left to its workers. PyTorch is imported, for a second or two more, where a target
is given, or made by other code than this package's, where sizes may be more than there is memory for, where images
pass one by one, where steps are to be captured or compiled, and where GPUs are asked for.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import socket
import sys
import urllib.request
from pathlib import Path

from dircluster import torchrun, zoo
from dircluster.cluster import storage
from dircluster.cluster.tracking import place
from dircluster.config import (
    ConfigError,
    RunConfig,
    check_schedules,
    digest,
    first_line,
    flatten,
    local_path,
    to_dict,
    without_secrets,
)
from dircluster.data import layout
from dircluster.files import FETCH, POINTER
from dircluster.presets import search_folder

ANSWER = 3.0
"""Seconds that the head of a cluster has to accept a connection, and to answer."""
PING = "/ray.rpc.NodeInfoGcsService/GetClusterId", b""
"""What Ray asks a cluster's head first, and the request's bytes."""
CLIENT_PING = "/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x06"
"""What its client (ray://) asks first: whether the server is there."""
NEITHER = ("", "auto", "local")
"""RAY_ADDRESS without an address."""
ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:")
"""How an address begins, and no path but a rare one."""
LARGE = 4096
"""A size above it is reason to count what a network holds; smaller ones seldom make one that there is no place for."""
MOST_NUMBERS = 10**11
"""In a network, on machines whose memory is not known here."""


DOWNLOADS = {
    "cifar10": ("cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "svhn": ("test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/test_32x32.mat"),
}
"""What torchvision makes of a named set in its folder, and where it fetches it."""


def check(config: RunConfig, on_ray: bool = True, download: bool = True, trains: bool = True) -> None:
    """Raise ConfigError, one line, where cluster, data or target of a run with absolute paths cannot be as they are.

    ``on_ray``: whether the run will join the cluster that RAY_ADDRESS names; ``download``: whether it will fetch what
    is not there yet; ``trains``: whether its training images must make a batch.
    """
    if trains:
        check_schedules(config)
    storage.check_name(config.storage.uri)
    if config.tracking.enabled:
        place.named(config)
    if on_ray:
        torchrun.check_alone("Ray starts its workers itself (those of --launcher local are torchrun's)")
        check_address(os.environ.get("RAY_ADDRESS", "").strip())
    elif config.scaling.least > 1 and not torchrun.is_member():
        count = config.scaling.workers
        raise ConfigError(f"--launcher local is one worker: start scaling.workers {count} by torchrun, or on Ray")
    away = elsewhere(on_ray)
    check_target(config, away)
    reads = not torchrun.is_member()  # of torchrun's processes the first one reads, and says for all what is wrong
    if reads:
        _check_data(config, trains, away)
    if not on_ray or _has_large(config):
        _check_sizes(config, away)
    if reads:
        if trains:
            if config.training.fewest == 1:
                from dircluster.training.export import check_statistics

                check_statistics(config)
            if not away:
                _check_switches(config)
            _try_target(config, away)
        if download and config.data.uri is None and not away:
            check_download(config.data.name, layout.data_cache(config.storage))


def _check_switches(config: RunConfig) -> None:
    """Raise ConfigError where this machine, which trains, lacks GPUs, or cannot capture, compile or fuse as asked."""
    scaling, gpus = config.scaling, config.scaling.device == "gpu"
    if not (gpus or "on" in (config.training.capture, config.training.fused) or config.training.compiles):
        return
    import torch

    found = torch.cuda.device_count()
    if gpus and found < scaling.least:
        raise ConfigError(
            f"scaling.workers {scaling.workers} need as many GPUs, but this machine has {found}; ask for fewer, or use"
            " --scaling.device cpu"
        )

    from dircluster.distributed.parallel import Parallel
    from dircluster.training.switches import check_switches

    device = torch.device("cuda" if scaling.device != "cpu" and found >= scaling.least else "cpu")
    check_switches(config, Parallel(0, scaling.least, device))


def is_here(name: str, cache: Path) -> bool:
    """Whether a named set comes with a package, or has been fetched into ``cache``."""
    return name not in DOWNLOADS or (cache / DOWNLOADS[name][0]).exists()


def check_download(name: str, cache: Path) -> None:
    """Raise ConfigError where a named set is not in ``cache`` yet and the server that has it does not answer."""
    if is_here(name, cache):
        return
    _, url = DOWNLOADS[name]
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER).close()
    except OSError as error:
        if getattr(error, "code", 0) not in (405, 501):  # servers that want to be asked otherwise
            reason = first_line(error)
            raise ConfigError(f"torchvision could not fetch {name}: {reason}; give --data.uri PATH instead") from error


def check_address(address: str) -> None:
    """Raise ConfigError where a value of RAY_ADDRESS is no address of a cluster, or no cluster answers there."""
    if address in NEITHER:
        return
    shown = f"RAY_ADDRESS {without_secrets(address)}"
    form = re.fullmatch(r"(?:(ray)://)?(\[[0-9A-Fa-f:]+\]|[^\s:/@\[\]]+)(?::(\d{1,5}))?/?", address)
    if form is None or (form[1] is None and form[3] is None):
        dashboard = " (an http:// address is the dashboard's, for ray job submit)" if "://" in address else ""
        raise ConfigError(f"{shown} is no address of a Ray cluster: give HOST:PORT of its head, port 6379{dashboard}")
    host, port = form[2].strip("[]"), int(form[3] or 10001)
    try:
        socket.create_connection((host, port), timeout=ANSWER).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            _ask_ray(f"{form[2]}:{port}", *(CLIENT_PING if form[1] else PING))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise ConfigError(
            f"no Ray cluster answers at {shown} ({reason}): start it, or unset RAY_ADDRESS to run on this machine"
        ) from error


def _ask_ray(address: str, method: str, request: bytes) -> None:
    """Raise OSError unless ``method`` of Ray is answered, be it with a lack of a token, which Ray tells better."""
    import grpc  # it takes half a second

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(request, timeout=ANSWER)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise OSError("it accepts a connection, and says nothing") from error
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise OSError("what listens there is something else") from error


def check_target(config: RunConfig, away: bool) -> None:
    """Raise ConfigError where ``target.uri`` names nothing, or ``target.architecture`` code that is not there.

    ``away`` as :func:`elsewhere` says.
    """
    uri, architecture = config.target.uri, config.target.architecture
    if uri is not None:
        check_model("target.uri", uri, config, away)
    elif architecture.startswith("timm:"):
        _check_timm(architecture)
    elif ":" in architecture and not away:
        check_code("target.architecture", architecture, os.getcwd())


_TRIED: set[str] = set()
"""Digests of targets that were loaded or made."""


def _has_large(config: RunConfig) -> bool:
    """Whether a size of a network or of the data is above LARGE."""
    sizes = ("data.channels", "data.height", "data.width", "data.classes")
    for name, value in flatten(to_dict(config)).items():
        if name in sizes or name.startswith("model."):
            values = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(each, int | float) and each > LARGE for each in values):
                return True
    return False


def _check_sizes(config: RunConfig, away: bool) -> None:
    """Raise ConfigError where a network is more than this machine's memory, or that of any where others compute."""
    from dircluster.training.export import check_sizes

    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4  # bytes of a number
    check_sizes(config, MOST_NUMBERS if away else min(here, MOST_NUMBERS))


def _try_target(config: RunConfig, away: bool) -> None:
    """Load a target that is given on this machine, or make one of other code, as the run will. Raises ConfigError.

    What is only fetched then is left out, and on a cluster code that may be on its nodes alone.
    """
    uri, architecture = config.target.uri, config.target.architecture
    code = ":" in architecture and not architecture.startswith("timm:")
    if code and away:
        return
    here = uri is not None and (zoo.is_shipped(uri) or (not _is_address(uri) and local_path(uri).exists()))
    if not here and (uri is not None or ":" not in architecture):
        return
    from dircluster.training.export import check_begins, check_made, load_target

    if code:
        search_folder(os.getcwd())
    tried = digest([to_dict(config.target), to_dict(config.data), config.defense])
    if tried in _TRIED:  # of a sweep all points may have the same
        return
    if here:
        check_begins(load_target(config), config)
    else:
        check_made(config)
    _TRIED.add(tried)


def _is_address(uri: str) -> bool:
    """Whether ``uri`` begins with a scheme, and names no path on this machine."""
    return ADDRESS.match(uri) is not None and not uri.startswith("file://") and not os.path.exists(uri)


def check_model(name: str, uri: str, config: RunConfig, away: bool) -> None:
    """Raise ConfigError where the classifier or defense that the setting ``name`` names by ``uri`` is not there.

    ``away`` as :func:`elsewhere` says.
    """
    if zoo.is_shipped(uri):
        zoo.find(uri)
    elif storage.is_remote(uri):
        storage.check_bucket(uri, config.storage, name=name)
    elif uri.startswith("timm:"):
        _check_timm(uri)
    elif name == "--defense" and ":" in uri and not uri.startswith(("file:", "runs:")) and "://" not in uri:
        if "/" not in uri and ".py:" not in uri and not os.path.exists(uri):
            check_code(name, uri, os.getcwd())
    elif _is_address(uri):
        if not uri.startswith("models:/"):
            raise ConfigError(
                f"{name} {without_secrets(uri)!r} is an address of no kind that is known here: give a file, a folder,"
                " s3://BUCKET/PATH, models:/NAME@ALIAS or zoo:NAME; of a classifier also timm:NAME"
            )
    else:
        _check_file(name, local_path(uri), away)


def check_code(name: str, factory: str, folder: str) -> None:
    """Raise ConfigError where the package of ``factory`` (package.module:factory) is neither in ``folder`` nor
    installed; it is not imported.
    """
    package = factory.partition(":")[0].partition(".")[0]
    if package in sys.modules:
        return
    known = package.isidentifier() and (
        importlib.util.find_spec(package) or importlib.machinery.PathFinder.find_spec(package, [folder])
    )
    if not known:
        raise ConfigError(f"{name} {factory!r}: there is no module {package!r} in {folder} or installed")


def elsewhere(on_ray: bool) -> bool:
    """Whether what a run reads may lie on other machines alone: it is torchrun's, or joins a cluster by RAY_ADDRESS."""
    return torchrun.is_member() or (on_ray and os.environ.get("RAY_ADDRESS", "").strip() not in NEITHER)


def _check_data(config: RunConfig, trains: bool, away: bool) -> None:
    uri = config.data.uri
    if uri is not None and storage.is_remote(uri):
        storage.check_bucket(uri, config.storage, name="data.uri")
        return
    if uri is not None and away and not local_path(uri).exists():
        return
    images, batch = layout.check(config.data)[0], config.training.batch_size
    if trains and images < batch:
        raise ConfigError(f"training.batch_size {batch} is more than the {images:,} training images")


def _check_file(name: str, path: Path, away: bool) -> None:
    if not path.exists():
        if away:
            return
        raise ConfigError(f"{name} {str(path)!r} does not exist")
    if path.is_file() and _begins(path, POINTER):
        raise ConfigError(f"{name} {str(path)!r} {FETCH}")
    if path.is_file() and path.suffix == ".safetensors" and not _begins(path, b"PK"):  # torch.save's by another name
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np"):  # type: ignore[no-untyped-call]
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{name} {str(path)!r} is not a sound safetensors file: {first_line(error)}") from error
    elif path.is_file() and path.stat().st_size == 0:
        raise ConfigError(f"{name} {str(path)!r} is empty")
    elif path.is_dir():
        try:
            first = next(path.iterdir(), None)
        except OSError as error:
            raise ConfigError(f"{name} {str(path)!r} cannot be read: {error.strerror}") from error
        if first is None:
            raise ConfigError(f"{name} {str(path)!r} is an empty folder")


def _begins(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:  # who reads it says why
        return False


def _check_timm(uri: str) -> None:
    """Raise ConfigError where no file of timm mentions the network: importing timm takes seconds."""
    spec, name = importlib.util.find_spec("timm"), uri.removeprefix("timm:").partition(".")[0]
    if spec is None or spec.origin is None:
        raise ConfigError(f"{uri} needs timm, which is not installed")
    mention = re.compile(rf"\b{re.escape(name)}\b")
    files = (Path(spec.origin).parent / "models").glob("*.py")
    if not name or not any(mention.search(file.read_text(errors="replace")) for file in files):
        raise ConfigError(f"timm has no model {name!r}; timm.list_models() names those that it has")
