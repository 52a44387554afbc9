"""What MLflow serves: logits for images in [0, 1], whatever their strides, and one line for any others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException

from dircluster.cluster.tracking.served_model import ServedDefense
from dircluster.zoo import folder_of

IMAGES = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def served() -> Any:
    """The shipped defense of the digits with masks that stay."""
    made = ServedDefense()
    made.load_context(SimpleNamespace(artifacts={"checkpoint": str(folder_of("zoo:digits-dir"))}))
    made.defense = made.defense.fixed(0)
    return made


@pytest.mark.parametrize("form", [np.asfortranarray, np.ndarray.tolist, lambda images: images[::-1].copy()[::-1]])
def test_images_in_any_memory_have_the_same_logits(served: Any, form: Any) -> None:
    logits = served.predict(None, form(IMAGES))
    np.testing.assert_array_equal(logits, served.defense(torch.from_numpy(IMAGES)).detach().numpy())


def test_no_images_have_no_logits(served: Any) -> None:
    assert served.predict(None, IMAGES[:0]).shape == (0, 10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((IMAGES * 255).round(), r"images must lie in \[0, 1\], got \d+ to 25\d$"),
        (IMAGES * 2 - 1, r"images must lie in \[0, 1\], got -0\.\d+ to 0\.\d+"),
        (IMAGES * float("nan"), r"images must lie in \[0, 1\], got nan to nan"),
        (IMAGES.reshape(3, 8, 8, 1), "channels come first"),
        (IMAGES[0], r"images must be \(N, C, H, W\), got shape \(1, 8, 8\)"),
        (None, "0-d tensor"),
        ([["a"]], "could not convert string to float"),
    ],
)
def test_what_is_no_image_is_an_invalid_parameter(served: Any, images: Any, message: str) -> None:
    with pytest.raises(MlflowException, match=f"^.*{message}.*$") as refusal:
        served.predict(None, images)
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
