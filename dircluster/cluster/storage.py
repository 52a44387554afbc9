"""Object storage: one s3fs filesystem, made of URI, endpoint and region, for datasets, checkpoints, reports and Ray.

Credentials are never arguments: botocore finds them in the environment, in a mounted file
(AWS_SHARED_CREDENTIALS_FILE) or in the instance role. So a path can be pickled, logged and sent to workers. Its
libraries are imported where they are used: a run in folders works without them.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import functools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from dircluster.config import ConfigError, RunConfig, StorageConfig, digest, first_line, local_path, refuse_secret
from dircluster.files import check_writable, write_whole
from dircluster.zoo import find, is_shipped

PATIENT, QUICK = 15, 1
"""Tries of a request: about two minutes with s3fs's pauses, or one."""


def is_remote(uri: str) -> bool:
    """Whether ``uri`` lies in object storage."""
    return uri.startswith("s3://")


def troubles() -> tuple[type[Exception], ...]:
    """What a storage raises that is full, or away for longer than is waited for it: of a run, its data too."""
    spoken = sys.modules.get("botocore.exceptions")  # None where nothing of this process lies in object storage
    return (OSError,) if spoken is None else (OSError, spoken.BotoCoreError)


def endpoint(storage: StorageConfig) -> str | None:
    """Address of the S3 server, None for AWS. Raises ConfigError where it holds a password."""
    found = storage.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    refuse_secret("AWS_ENDPOINT_URL_S3", found or "")
    return found


def to_environment(storage: StorageConfig) -> None:
    """Let everything of this process that speaks S3 by itself (MLflow's artifacts) find the server and region.

    MLFLOW_S3_ENDPOINT_URL, where it is set, stays: MLflow may keep its artifacts on a server of their own.
    """
    if storage.endpoint:
        os.environ["AWS_ENDPOINT_URL_S3"] = storage.endpoint
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", storage.endpoint)
    if storage.region:
        os.environ["AWS_DEFAULT_REGION"] = storage.region


def _options(storage: StorageConfig) -> dict[str, Any]:
    client = {"region_name": storage.region} if storage.region else {}
    return {
        "endpoint_url": endpoint(storage),
        "client_kwargs": client,
        "config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 0}},
        "use_listings_cache": False,  # other nodes write too
    }


def filesystem(storage: StorageConfig) -> Any:
    """The s3fs filesystem of this process for ``storage``."""
    import fsspec
    import s3fs.core
    from botocore.exceptions import BotoCoreError

    if BotoCoreError not in s3fs.core.S3_RETRYABLE_ERRORS:  # a server that refuses connections may come back
        s3fs.core.add_retryable_error(BotoCoreError)
        s3fs.core.set_custom_error_handler(_is_passing)
    found = fsspec.filesystem("s3", **_options(storage))
    found.retries = PATIENT
    return found


def _is_passing(error: Exception) -> bool:
    """Whether a server's answer is its own trouble (5xx), which may pass."""
    answer: dict[str, Any] = getattr(error, "response", {})
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500


def open_path(uri: str, storage: StorageConfig) -> Path:
    """A folder, or a prefix in object storage that is used like one."""
    if not is_remote(uri):
        return local_path(uri)
    from upath import UPath

    filesystem(storage)
    return cast(Path, UPath(uri, **_options(storage)))


@functools.cache
def version(uri: str, storage: StorageConfig) -> str:
    """What tells the files that ``uri`` names from others of those names: a digest of their sizes and times, or ETags,
    as this process first saw them; empty where it sees none. Raises ConfigError where object storage does not answer.
    """
    from botocore.exceptions import NoCredentialsError

    if uri.startswith("timm:"):
        return ""
    if is_shipped(uri):
        return find(uri).sha256
    if is_remote(uri):
        files = filesystem(storage)
        files.retries = QUICK
        try:
            found = files.find(uri, detail=True)
        except (FileNotFoundError, PermissionError, NoCredentialsError):
            return ""
        except Exception as error:  # whatever a network that is not there says
            raise ConfigError(f"{uri}: {endpoint(storage) or 'AWS'} does not answer ({first_line(error)})") from error
        finally:
            files.retries = PATIENT
        facts = [(name, file["size"], file["ETag"]) for name, file in found.items()]
    else:
        place = local_path(uri)
        here = [file for file in (place, *sorted(place.rglob("*"))) if file.is_file()]
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in here]
    return digest(facts) if facts else ""


def check_name(uri: str) -> None:
    """Raise ConfigError where ``storage.uri`` holds what MLflow, SQLite or S3 take for something else in an address."""
    bent = sorted(set(re.findall(r"[%?#\x00-\x1f\x7f]", uri)))
    if bent:
        raise ConfigError(
            f"storage.uri {uri!r} holds {' and '.join(map(repr, bent))}, with another meaning in an address:"
            " give a folder without (--storage.uri)"
        )


def check(config: RunConfig) -> None:
    """Prove within seconds that ``storage.uri`` can be written. Raises ConfigError, one line, where it cannot."""
    storage = config.storage
    if is_remote(storage.uri):
        check_bucket(storage.uri, storage, write=True)
    else:
        _check_folder(local_path(storage.uri), storage.uri)
    path = open_path(storage.uri, storage)
    if any(path.glob("step-*")) or (path / "final").exists():
        raise ConfigError(
            f"storage.uri {storage.uri!r} is the folder of one stage of another run; give the folder above it,"
            " where runs of any settings lie side by side"
        )


def check_bucket(uri: str, storage: StorageConfig, write: bool = False, name: str = "storage.uri") -> None:
    """Prove within seconds that ``uri`` can be read, or written. Raises ConfigError, one line, where it cannot.

    ``name`` is the setting that gives ``uri``.
    """
    import boto3
    from botocore.exceptions import NoCredentialsError

    bucket, where = uri.removeprefix("s3://").partition("/")[0], endpoint(storage)
    if not bucket:
        raise ConfigError(f"{name} must name a bucket, s3://BUCKET/PREFIX")
    session = boto3.Session()
    region = storage.region or session.region_name
    if where is None and region is not None:
        known = [r for p in session.get_available_partitions() for r in session.get_available_regions("s3", p)]
        if region not in known:
            near = difflib.get_close_matches(region, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"storage.region {region!r} is no region of AWS{hint}")
    files, server = filesystem(storage), where or "AWS"
    files.retries = QUICK
    probe, right = f"{uri.rstrip('/')}/.write-probe-{os.getpid()}", "s3:ListBucket"
    try:
        if write:
            right = "s3:PutObject"
            files.pipe_file(probe, b"")
            right = "s3:DeleteObject"
            files.rm_file(probe)
            right = "s3:ListBucket"
            with contextlib.suppress(FileNotFoundError):  # nothing lies there yet
                files.ls(uri, refresh=True)
            right = "s3:GetObject"
            with contextlib.suppress(FileNotFoundError):
                files.cat_file(probe)
        else:
            files.ls(uri, refresh=True)
    except FileNotFoundError as error:
        missing = f"there is no bucket {bucket!r} at {server}; make it first" if write else f"{uri} does not exist"
        raise ConfigError(f"{name}: {missing}") from error
    except PermissionError as error:
        raise ConfigError(
            f"{name}: {server} refuses the credentials at hand for bucket {bucket!r} ({first_line(error)});"
            f" they must allow {right}"
        ) from error
    except NoCredentialsError as error:
        raise ConfigError(
            f"{name}: no credentials for S3; set AWS_SHARED_CREDENTIALS_FILE, or AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or run with an instance role"
        ) from error
    except Exception as error:  # whatever a network that is not there says
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise ConfigError(
                f"{name}: {server} shows a certificate that is not trusted here ({first_line(error)}); of an authority"
                " of your own: set AWS_CA_BUNDLE to its file, on every node"
            ) from error
        raise ConfigError(f"{name}: {server} does not answer ({first_line(error)}); see storage.endpoint") from error
    finally:
        files.retries = PATIENT


def _check_folder(folder: Path, uri: str) -> None:
    """Make the storage folder and prove that it can be written. Raises ConfigError where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
    except OSError as error:
        raise ConfigError(f"storage.uri {uri!r} cannot be written: {error.strerror or error}") from error


def copy(source: Path, target: Path) -> None:
    """Copy the files of a folder, each whole; the commit marker of a checkpoint goes last."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda f: (f.name == "COMMIT", f.name)):
        write_whole(target / file.name, file.read_bytes())


def local_copy(folder: Path) -> Path:
    """``folder`` itself, or where it lies in object storage a copy of its files in a new folder here."""
    if isinstance(folder, Path):
        return folder
    here = temporary_folder()
    copy(folder, here)
    return here


def temporary_folder() -> Path:
    """A new folder on this machine that lasts as long as this process."""
    made = Path(tempfile.mkdtemp(prefix="dircluster-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def for_ray(config: RunConfig) -> dict[str, Any]:
    """``storage_path`` and ``storage_filesystem`` of a Ray Train run."""
    storage = config.storage
    if not is_remote(storage.uri):
        return {"storage_path": str(local_path(storage.uri) / "ray")}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    path = f"{storage.uri.removeprefix('s3://').rstrip('/')}/ray"
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem(storage)))}


def opener(storage: StorageConfig) -> Callable[[str], Path]:
    """:func:`open_path` for one storage, as the core takes it."""
    return lambda uri: open_path(uri, storage)
