"""What the workers of a run are doing, asked on their nodes from outside: a stopped process can be asked too."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

GONE = "gone"
PATIENCE = 20.0
"""Seconds a node has to answer."""


def _look(process: int) -> str:
    """The stack of ``process`` on this node, or GONE."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return GONE
    if state == "Z":
        return GONE
    stopped = "stopped by a signal; " if state in "Tt" else ""
    tool = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if tool is None:
        return f"{stopped}no stack: py-spy is not installed"
    command = [tool, "dump", "--nonblocking", "--pid", str(process)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE / 2, check=False)
    except subprocess.TimeoutExpired:
        return f"{stopped}no stack: py-spy did not answer"
    return stopped + (done.stdout if done.returncode == 0 else f"no stack: {done.stderr.strip()}")


def _end(process: int) -> str:
    with contextlib.suppress(OSError):
        os.kill(process, signal.SIGKILL)
    return GONE


def _on_nodes(work: Any, workers: dict[int, tuple[str, int]]) -> dict[int, str]:
    asked = {}
    for rank, (node, process) in workers.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        asked[rank] = ray.remote(num_cpus=0, max_retries=0)(work).options(scheduling_strategy=there).remote(process)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE)
    answers = {}
    for rank, answer in asked.items():
        try:
            answers[rank] = str(ray.get(answer, timeout=0.1))
        except ray.exceptions.GetTimeoutError:
            answers[rank] = f"no answer from its node within {PATIENCE:.0f} s"
        except ray.exceptions.RayTaskError as error:
            answers[rank] = f"no stack: {str(error).splitlines()[-1]}"
        except ray.exceptions.RayError:
            answers[rank] = GONE
    return answers


def dump(workers: dict[int, tuple[str, int]]) -> dict[int, str]:
    """The stack of every worker's process by its rank, GONE for one that is no more."""
    return _on_nodes(_look, workers)


def end(workers: dict[int, tuple[str, int]]) -> None:
    """Kill the processes of a run that is given up: what hangs does not hear Ray's polite way."""
    _on_nodes(_end, workers)
