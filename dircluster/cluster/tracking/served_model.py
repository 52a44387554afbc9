"""What MLflow runs to serve a registered defense: images (N, C, H, W) float32 in [0, 1] -> logits (N, classes)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from dircluster.config import ConfigError
from dircluster.evaluation.inputs import as_images
from dircluster.training.export import load_defense_folder


class ServedDefense(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """The defended classifier, with fresh masks at each call."""

    def load_context(self, context: Any) -> None:
        self.defense = load_defense_folder(
            Path(context.artifacts["checkpoint"]), trust_code=True
        )  # who runs this file has trusted the model's code already

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads the hints
        try:
            images = torch.from_numpy(np.array(model_input, dtype=np.float32, order="C"))
            if len(images) > 0:
                images, _ = as_images(images)  # pixels of 0 to 255 would be answered, and wrongly
            with torch.no_grad():
                logits: NDArray[np.float32] = self.defense(images).numpy()
        except (ConfigError, TypeError, ValueError) as error:  # who asked has to know, and the server goes on
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return logits


mlflow.models.set_model(ServedDefense())
