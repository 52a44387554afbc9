"""MLflow finds the evaluator in an installed package: no import of ours comes first."""

from __future__ import annotations

import importlib.metadata

from mlflow.models.evaluation.evaluator_registry import ModelEvaluatorRegistry


def test_the_installed_package_offers_its_evaluator() -> None:
    points = importlib.metadata.entry_points(group="mlflow.model_evaluator", name="dircluster")
    assert len(points) == 1, "the installation is older than pyproject.toml: make .venv/product"
    registry = ModelEvaluatorRegistry()
    registry.register_entrypoints()
    assert registry.get_evaluator("dircluster").can_evaluate(model_type="classifier", evaluator_config={})
