"""Records on their way to MLflow: what it will never accept is said, and does not block what comes after."""

from __future__ import annotations

from pathlib import Path

from dircluster.cluster.tracking.jobs import JobRecord, Refused
from dircluster.cluster.tracking.tracker import MlflowTracker


def test_what_is_refused_is_said_and_does_not_block(tmp_path: Path) -> None:
    got: list[int] = []
    lines: list[str] = []
    down = [ConnectionError("no server"), Refused("parameter changed\nsecond line")]

    def record() -> None:
        if down:
            raise down.pop(0)

    tracker = MlflowTracker(JobRecord(f"sqlite:///{tmp_path / 'mlflow.db'}", "0", "run", "runs", 20.0), lines.append)
    tracker.queue.put(record)
    tracker.queue.put(lambda: got.append(1))
    tracker.close()
    assert got == [1]
    assert lines == [
        "MLflow does not answer (ConnectionError); keeping records until it does",
        "MLflow refused a record: parameter changed",
        "MLflow answers again",
    ]
