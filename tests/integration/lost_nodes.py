"""Shards on nodes of one CPU that are lost for good; what was done and said is printed, as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from dircluster.cluster.runtime import ray_evaluate


class Worker:
    """Notes each shard that it begins; one begun for the first time takes so many ``seconds``."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def ready(self) -> None: ...

    def work(self, index: int) -> None:
        if not (self.folder / str(index)).exists():
            (self.folder / str(index)).touch()
            time.sleep(self.seconds)


class Terminal:
    """Is asked twice a second, and then does what is to be done once all shards have begun."""

    def __init__(self, folder: Path, indices: list[int], *then: Callable[[], None]) -> None:
        self.files, self.then = [folder / str(index) for index in indices], list(then)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)
        if self.then:
            self.then.pop(0)()

    def stop_signal(self) -> int:
        if all(file.exists() for file in self.files):
            self.files = [self.files[0] / "never"]
            self.then.pop(0)()
        return 0


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    nodes: list[Any] = []

    def gain() -> None:
        nodes.append(cluster.add_node(num_cpus=1, object_store_memory=100_000_000))

    def lose() -> None:
        cluster.remove_node(nodes.pop())

    def share_out(indices: list[int], seconds: float, *then: Callable[[], None]) -> dict[str, Any]:
        """``then`` is done in turn: once all shards have begun, and at the first lines that are said."""
        done: list[int] = []
        terminal: Any = Terminal(folder, indices, *then)
        actors = [kind.remote(folder, seconds) for _ in indices]
        ray_evaluate._share_out(actors, indices, terminal, done.append)
        return {"done": sorted(done), "said": terminal.said}

    try:
        gain()
        gain()
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        kind = ray.remote(Worker).options(num_cpus=1, max_restarts=1, max_task_retries=1)
        one = share_out([0, 1], 8.0, lose)
        ray_evaluate.PATIENCE = 3.0
        last = share_out([2], 600.0, lose, gain)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps({"one of two": one, "the last": last}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
