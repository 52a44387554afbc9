"""Ray Train's trainer without the helpers that a run has no use for: processes that start before workers do."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # without torch, unlike TorchTrainer


class LeanTrainer(DataParallelTrainer):
    """For runs that read no data sets of Ray's.

    ``alone``: on a cluster that was started for this run. It ends with the run, so that nobody needs to clean up after
    it, and does not grow, so that nobody needs to be asked for more of it.
    """

    def __init__(self, *given: Any, alone: bool, **named: Any) -> None:
        super().__init__(*given, **named)
        self.alone = alone

    def _create_default_callbacks(self) -> list[Any]:
        needless = (DatasetsCallback, PlacementGroupCleanerCallback) if self.alone else (DatasetsCallback,)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, needless)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if self.alone and type(given["scaling_policy"]) is FixedScalingPolicy:
            given["scaling_policy"] = _NoQuestions(self.scaling_config)
        return super()._initialize_and_run_controller(**given)


class _NoQuestions(FixedScalingPolicy):
    """A fixed number of workers, without a request for room: Ray's would wait for a process that answers it."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...
