"""Where a run computes, stores and tells, as frozen dataclasses: nothing here decides its numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dircluster.config.errors import require, require_positive, require_seconds, without_secrets

MOST_THREADS = 1024
"""Threads of a worker; no machine has more cores, and libraries end without a word where they cannot start them."""

LONGEST_NAME = 256
"""Characters of an experiment's name that MLflow's table of them has room for; SQLite alone takes more."""


@dataclass(frozen=True)
class ScalingConfig:
    """How many processes share a step, and on what."""

    workers: int | str = 1
    """Ray Train workers, or LEAST:MOST to go with the nodes there are (torchrun counts its own --nproc-per-node)."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes GPUs where every worker can have one."""
    threads: int | None = None
    """CPU threads a worker; the machine's cores shared evenly when not given."""
    max_failures: int = 8
    """Times that Ray Train restarts the workers after one died."""
    wait: float = 0.0
    """Seconds that a cluster which is too small may take to grow, where an autoscaler starts its nodes."""
    resize_every: float = 60.0
    """Seconds between two looks for nodes that have come, where workers is LEAST:MOST."""
    stall: float = 600.0
    """Seconds without progress after which a run is ended with a stack dump of all workers."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[1-9]\d{0,4}(:[1-9]\d{0,4})?", str(self.workers)) is not None and self.least <= self.most,
            f"scaling.workers must be a number from 1, or LEAST:MOST such as 1:4, got {self.workers}",
        )
        require_positive("scaling", self, "resize_every", "stall")
        require(self.wait >= 0, f"scaling.wait must be 0 or more, got {self.wait}")
        require_seconds("scaling", self, "wait", "resize_every", "stall")
        require(
            self.threads is None or 0 < self.threads <= MOST_THREADS,
            f"scaling.threads must lie in [1, {MOST_THREADS}], got {self.threads}",
        )
        require(self.max_failures >= 0, f"scaling.max_failures must be 0 or more, got {self.max_failures}")

    @property
    def least(self) -> int:
        """Fewest workers that a run goes on with."""
        return int(str(self.workers).partition(":")[0])

    @property
    def most(self) -> int:
        """Workers that a run takes where it can have them."""
        return int(str(self.workers).rpartition(":")[2])

    def workers_on(self, cpus: int, gpus: int) -> int:
        """Workers on a machine that nothing comes to or goes from: MOST, or as many as it has CPUs or GPUs for."""
        there = gpus if self.device == "gpu" or (self.device == "auto" and gpus >= self.least) else cpus
        return max(self.least, min(self.most, there))


@dataclass(frozen=True)
class ParallelConfig:
    """How workers share a model that is trained. Neither changes what is computed, but for rounding."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every worker holds all weights; fsdp: weights, gradients and optimizer state are sharded (FSDP2)."""
    activation_checkpointing: bool = False
    """Compute the denoiser's activations again in the backward pass instead of keeping them: less memory, more time."""


@dataclass(frozen=True)
class StorageConfig:
    """Where checkpoints and reports are kept.

    Credentials never stand here: they come from the environment, a mounted file or the instance role.
    """

    uri: str = "runs"
    """A folder, or s3://BUCKET/PREFIX; all nodes of a cluster must reach it."""
    endpoint: str | None = None
    """Address of an S3 server other than AWS; AWS_ENDPOINT_URL_S3 when not given."""
    region: str | None = None
    """Region of the bucket; AWS_DEFAULT_REGION or the machine's own when not given."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also written at the end of a stage and on interruption."""
    patience: float = 600.0
    """Seconds that the end of a stage waits for storage that does not take its checkpoints."""

    def __post_init__(self) -> None:
        require_positive("storage", self, "checkpoint_every")
        require(self.uri != "", "storage.uri must not be empty")
        known = re.match(r"file:///?|s3://[a-z0-9]", self.uri)
        address = re.match(r"[A-Za-z][\w+.-]+:/", self.uri) or "://" in self.uri  # s3:/bucket would be a folder here
        require(
            known is not None or not address,
            f"storage.uri must be a folder or s3://BUCKET/PREFIX, got {without_secrets(self.uri)!r}",
        )
        require(
            self.endpoint is None or self.endpoint.startswith(("http://", "https://")),
            f"storage.endpoint must begin with http:// or https://, got {without_secrets(self.endpoint or '')!r}",
        )
        require(self.patience >= 0, f"storage.patience must be 0 or more, got {self.patience}")
        require_seconds("storage", self, "patience")


@dataclass(frozen=True)
class TrackingConfig:
    """What is shown in MLflow and on the console, and how often."""

    enabled: bool = True
    """False keeps no MLflow record."""
    uri: str | None = None
    """MLflow tracking URI; an SQLite file in storage.uri when not given."""
    experiment: str = "dircluster"
    """MLflow experiment."""
    log_every: int = 10
    """Steps between two points of a curve."""
    picture_every: int = 5
    """Epochs between two picture grids."""
    patience: float = 600.0
    """Seconds that the end of a job waits for an MLflow server that is down."""

    def __post_init__(self) -> None:
        require_positive("tracking", self, "log_every", "picture_every")
        require(self.patience >= 0, f"tracking.patience must be 0 or more, got {self.patience}")
        require_seconds("tracking", self, "patience")
        require(self.uri is None or self.uri.strip() != "", "tracking.uri must not be empty")
        require(self.experiment.strip() != "", f"tracking.experiment must be a name, got {self.experiment!r}")
        length = len(self.experiment)
        require(
            length <= LONGEST_NAME,
            f"tracking.experiment must be at most {LONGEST_NAME} characters, which is what MLflow's databases hold,"
            f" got {length}",
        )
