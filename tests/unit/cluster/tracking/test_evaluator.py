"""MLflow finds the evaluator in an installed package: no import of ours comes first. What it is given is checked."""

from __future__ import annotations

import importlib.metadata

import pytest
from mlflow.models.evaluation.evaluator_registry import ModelEvaluatorRegistry


def test_the_installed_package_offers_its_evaluator() -> None:
    points = importlib.metadata.entry_points(group="mlflow.model_evaluator", name="dircluster")
    assert len(points) == 1, "the installation is older than pyproject.toml: make .venv/product"
    registry = ModelEvaluatorRegistry()
    registry.register_entrypoints()
    assert registry.get_evaluator("dircluster").can_evaluate(model_type="classifier", evaluator_config={})


@pytest.mark.parametrize(
    "wrong", [{"seed": "x"}, {"seed": 1.5}, {"shape": "1x8x8"}, {"shape": (64,)}, {"shape": (1, 8.0, 8)}]
)
def test_a_seed_or_shape_that_is_none_is_named(wrong: dict[str, object]) -> None:
    from dircluster.cluster.tracking.evaluator import read_settings
    from dircluster.config import ConfigError

    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        read_settings(wrong)
    assert read_settings({"seed": 3, "shape": [1, 8, 8]})[2] == {"seed": 3, "shape": [1, 8, 8]}


@pytest.mark.parametrize("wrong", [[0.0, 1.7], [0.0, float("nan")], [0.0, float("inf")]])
def test_labels_that_are_no_whole_numbers_are_not_rounded(wrong: list[float]) -> None:
    from dircluster.cluster.tracking.evaluator import whole_labels
    from dircluster.config import ConfigError

    with pytest.raises(ConfigError, match="labels must be whole numbers"):
        whole_labels(wrong)
    assert whole_labels([3.0, 0.0]).tolist() == whole_labels([3, 0]).tolist() == [3, 0]
