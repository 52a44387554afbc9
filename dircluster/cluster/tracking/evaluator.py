"""An evaluator for MLflow: ``mlflow.models.evaluate(model, data, model_type="classifier", evaluators="dircluster")``.

It is an entry point of the package, and registered too wherever this module is imported.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from mlflow.models.evaluation.artifacts import JsonEvaluationArtifact, TextEvaluationArtifact
from mlflow.models.evaluation.base import EvaluationResult, ModelEvaluator
from mlflow.models.evaluation.evaluator_registry import _model_evaluation_registry
from mlflow.tracking import MlflowClient

from dircluster.config import AttackConfig, ConfigError, DataConfig, EvaluationConfig, RunConfig, first_line

NAME = "dircluster"
THREAT = ("epsilon", "norm", "step_size")
OWN = ("shape", "seed", "name")


class DirclusterEvaluator(ModelEvaluator):
    """Robust accuracies of an image classifier as metrics, and the report as artifacts.

    ``evaluator_config`` takes the fields of EvaluationConfig (suite, verdict, images, ...), ``epsilon``, ``norm`` and
    ``step_size``, ``seed``, ``name``, and ``shape`` (channels, height, width) where the model's signature has none:
    MLflow wants images flat, (N, channels * height * width), in [0, 1].
    """

    name = NAME

    @classmethod
    def can_evaluate(cls, *, model_type: str, evaluator_config: Mapping[str, Any], **kwargs: Any) -> bool:
        """Classifiers."""
        return model_type == "classifier"

    def evaluate(
        self,
        *,
        model_type: str,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: Any = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult | None:
        """Judge ``model`` on the features and labels of ``dataset``. MLflow records the metrics with the logged model.

        None, and a warning that says why, for a model without gradients, unknown settings, and whatever
        dircluster.evaluate refuses: MLflow asks all installed evaluators where none is named, and calls it an error
        where none answers.
        """
        try:
            return self._evaluate(dataset, run_id, evaluator_config, model, model_id)
        except ConfigError as error:
            logging.getLogger(__name__).warning("%s cannot evaluate this: %s", NAME, error)
            return None

    def _evaluate(
        self, dataset: Any, run_id: str, evaluator_config: Mapping[str, Any], model: Any, model_id: str | None
    ) -> EvaluationResult:
        import numpy as np
        import torch

        from dircluster import evaluate
        from dircluster.cluster.tracking.accuracies import accuracies, dataset_of, log_accuracies
        from dircluster.cluster.version import commit
        from dircluster.data.split import Split
        from dircluster.evaluation.html_report import write_report
        from dircluster.evaluation.results import to_plain
        from dircluster.evaluation.sample import row_numbers

        attack, settings, own = read_settings(evaluator_config)
        module, seed, name = module_of(model), int(own.get("seed", 0)), str(own.get("name", "defense"))
        if not dataset.has_targets:
            raise ConfigError("the data has no labels: give targets")
        shape = own.get("shape") or _shape_of(model)
        try:
            flat = np.asarray(dataset.features_data, dtype=np.float32)
            labels = torch.from_numpy(whole_labels(dataset.labels_data))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"images and labels must be numbers: {first_line(error)}") from error
        if shape is None or math.prod(shape) != flat.shape[1]:
            raise ConfigError(
                f"images have {flat.shape[1]} values, and shape is {shape}: evaluator_config['shape'] says what they"
                " are, (channels, height, width)"
            )
        images = torch.from_numpy(flat).view(-1, *shape)
        threat = {"epsilon": attack.epsilon, "norm": attack.norm, "step_size": attack.step_size}
        report = evaluate(module, images, labels, settings.suite, settings=settings, seed=seed, name=name, **threat)
        flags = len(report.flags) if report.verdict else None
        metrics = accuracies(to_plain(report.rows), attack.norm, flags)

        numbers = row_numbers(len(images), settings)
        channels, height, width = shape
        data = DataConfig(
            name="custom",
            uri=str(dataset.name),
            height=height,
            width=width,
            channels=channels,
            classes=max(2, int(labels.max()) + 1),
        )
        config = RunConfig(name, seed, data=data, attack=attack, evaluation=settings)
        test = Split((images[numbers] * 255).round().byte(), labels[numbers])
        logged = model_id or getattr(model, "model_id", None)  # MLflow knows no id where the URI is an alias
        facts = {"data": str(dataset.hash), "defense": logged or name, "commit": commit()}
        client, artifacts = MlflowClient(), {}
        with tempfile.TemporaryDirectory() as folder:
            victim = report.evaluation.victim
            files = write_report(report, victim, test, config, facts, Path(folder), None, print, numbers)
            for file, kind in zip(files, (TextEvaluationArtifact, JsonEvaluationArtifact), strict=True):
                client.log_artifact(run_id, str(file))
                if logged is not None:
                    client.log_model_artifact(logged, str(file))
                uri = f"{client.get_run(run_id).info.artifact_uri}/{file.name}"
                artifacts[file.suffix[1:]] = kind(uri=uri)
        if model_id is None:  # else MLflow does so
            of = dataset_of(str(dataset.name), str(dataset.digest or dataset.hash), str(dataset.path or dataset.name))
            log_accuracies(client, run_id, metrics, of, logged)
        return EvaluationResult(metrics, artifacts, run_id)


def read_settings(given: Mapping[str, Any]) -> tuple[AttackConfig, EvaluationConfig, dict[str, Any]]:
    """Threat, settings and the rest of an ``evaluator_config``. Raises ConfigError for an unknown name, and where seed
    or shape is no such thing.
    """
    fields = {field.name for field in dataclasses.fields(EvaluationConfig)}
    unknown = sorted(set(given) - fields - {*THREAT, *OWN})
    if unknown:
        known = ", ".join(sorted({*fields, *THREAT, *OWN}))
        raise ConfigError(f"evaluator_config has no {unknown[0]!r}; there are {known}")
    seed, shape = given.get("seed", 0), given.get("shape")
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise ConfigError(f"evaluator_config['seed'] must be a whole number, got {seed!r}")
    whole = isinstance(shape, list | tuple) and all(isinstance(n, Integral) and int(n) > 0 for n in shape)
    if shape is not None and not (whole and len(shape) == 3):
        raise ConfigError(f"evaluator_config['shape'] must be (channels, height, width), got {shape!r}")
    attack = AttackConfig(**{name: given[name] for name in THREAT if name in given})
    settings = EvaluationConfig(**{name: given[name] for name in fields if name in given})
    return attack, settings, {name: given[name] for name in OWN if name in given}


def whole_labels(given: Any) -> Any:
    """Labels of MLflow's data, which may be whole numbers in a column of decimal ones, as a NumPy array of int64.

    Raises ConfigError for others, and what NumPy raises for what is no number.
    """
    import numpy as np

    found = np.asarray(given, dtype=np.float64)
    if not np.array_equal(found, np.trunc(found)) or not np.isfinite(found).all():
        raise ConfigError("labels must be whole numbers: give the numbers of classes, from 0")
    return found.astype(np.int64)


def module_of(model: Any) -> Any:
    """The torch module in a pyfunc model: of the flavor pytorch, or of a defense that was registered here.

    Raises ConfigError where there is none: an attack follows gradients, which ``predict`` does not have.
    """
    from torch import nn

    for read in ("get_raw_model", "unwrap_python_model"):
        try:
            found = getattr(model, read)()
        except Exception:  # a model that has no such form
            continue
        for candidate in (found, getattr(found, "defense", None), getattr(found, "model", None)):
            if isinstance(candidate, nn.Module):
                return candidate
    raise ConfigError(
        "the model holds no torch module that gradients could be taken of: log it with mlflow.pytorch, or as a python"
        " model with the module as its attribute model"
    )


def _shape_of(model: Any) -> tuple[int, ...] | None:
    """Channels, height and width in the signature of a pyfunc model; None where it says nothing of the kind."""
    inputs = getattr(getattr(getattr(model, "metadata", None), "signature", None), "inputs", None)
    shape = tuple(inputs.inputs[0].shape) if inputs is not None and inputs.is_tensor_spec() else ()
    return shape[1:] if len(shape) == 4 else None


_model_evaluation_registry.register(NAME, DirclusterEvaluator)
