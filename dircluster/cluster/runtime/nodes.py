"""What a cluster must be before a run starts on it: large enough, and of the same version as the job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dircluster.cluster.version import source_version
from dircluster.config import ConfigError, ScalingConfig, first_line

if TYPE_CHECKING:
    from dircluster.cluster.console import Terminal

PATIENCE = 60.0
"""Seconds that the nodes have to say what they run."""


def must_suffice(scaling: ScalingConfig, terminal: Terminal) -> None:
    """Raise ConfigError unless the cluster has what ``scaling`` needs, or gets it within ``scaling.wait`` seconds.

    It returns at once, whatever there is, where the person asks to stop.
    """
    kind = "GPU" if scaling.device == "gpu" else "CPU"
    asks = scaling.wait > 0 and ray.cluster_resources().get(kind, 0) < scaling.least
    if asks:
        request_resources(bundles=[{kind: 1}] * scaling.least)
    try:
        _wait(scaling, kind, terminal)
    finally:
        if asks:
            request_resources(bundles=[])  # it would outlive this job; from here on Ray Train asks for itself


def _wait(scaling: ScalingConfig, kind: str, terminal: Terminal) -> None:
    deadline = time.monotonic() + scaling.wait
    while (found := ray.cluster_resources().get(kind, 0)) < scaling.least and not terminal.stop_signal():
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"scaling.workers {scaling.workers} need as many {kind}s, but the cluster has {found:g};"
                " ask for fewer, or give an autoscaler time with --scaling.wait SECONDS"
            )
        time.sleep(1.0)


def cores_each(workers: int, kind: str) -> int:
    """CPU threads that each of ``workers`` may take, each with a CPU or GPU (``kind``), wherever they come to lie."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind)]
    return min((max(1, int(has.get("CPU", 0) // min(workers, has[kind]))) for has in there), default=1)


def must_run_this_version() -> None:
    """Raise ConfigError unless the head and every node that offers CPUs or GPUs import the very code of this job."""

    def ask() -> str:  # inside, so that it travels by value: the node may not have this module
        try:
            from dircluster.cluster.version import source_version

            return source_version()
        except Exception as error:
            return f"none that is usable ({type(error).__name__})"

    own, asked = source_version(), []
    for node in ray.nodes():
        offers: dict[str, Any] = node["Resources"]
        if node["Alive"] and any(offers.get(kind) for kind in ("CPU", "GPU", "node:__internal_head__")):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0)(ask).options(scheduling_strategy=there)
            asked.append((node["NodeManagerAddress"], task.remote()))  # some nodes may share an address
    ray.wait([answer for _, answer in asked], num_returns=len(asked), timeout=PATIENCE)
    for address, answer in asked:
        try:
            found = ray.get(answer, timeout=0.1)
        except ray.exceptions.GetTimeoutError:
            continue  # a slow node is no other version
        except ray.exceptions.RayError as error:
            raise ConfigError(f"node {address} cannot run this job: {first_line(error)}") from error
        if found != own:
            raise ConfigError(
                f"node {address} runs dircluster {found}, this job is {own};"
                " submit with --working-dir . or install the same version on all nodes"
            )
