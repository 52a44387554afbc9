"""What a worker of jobs/evaluate.py knows before it begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dircluster.cluster.loading import JobSpec
from dircluster.cluster.runtime.evaluation_job import EvaluationJob
from dircluster.config import StorageConfig
from dircluster.presets import preset, run_to_plain
from tests.pictures import png


def test_a_report_says_that_images_lie_in_the_order_of_their_classes(tmp_path: Path) -> None:
    labels = [row // 20 for row in range(200)]
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": [png(side=8)] * 200, "label": labels}), tmp_path / f"{split}.parquet")
    run = preset("digits_smoke")
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, uri=str(tmp_path), limit=None),
        evaluation=dataclasses.replace(run.evaluation, images=20),
        storage=StorageConfig(uri=str(tmp_path / "runs")),
    )
    made = EvaluationJob(JobSpec(run_to_plain(run), "zoo:digits-dir", ""), torch.device("cpu"))
    said = "the 20 judged images are of 1 of 10 classes: --evaluation.sample SEED judges random ones"
    assert made.victim.notes[-1] == said
