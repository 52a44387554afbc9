"""dircluster: trains, ablates and honestly judges defenses that clean adversarial noise off images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dircluster.defenses.base import Defended
    from dircluster.evaluation.session import EvaluationReport

__version__ = "0.1.0"


def evaluate(module: nn.Module, images: Tensor, labels: Tensor, suite: str = "quick", **how: Any) -> EvaluationReport:
    """Judge any module of images (N, C, H, W) in [0, 1] -> logits; see dircluster.evaluation.session.evaluate.

    ``suite`` is quick, autoattack, paper or rigorous; ``verdict=True`` asks whether the module only hides gradients;
    ``attacks`` are met besides those of the suite.
    """
    from dircluster.evaluation import session

    return session.evaluate(module, images, labels, suite, **how)


def load_defense(uri: str | Path, *, tracking_uri: str | None = None, trust_code: bool = False) -> Defended:
    """A finished defense, ready to classify: (N, C, H, W) in [0, 1] -> (N, classes) logits, fresh masks at each call.

    ``uri`` is the folder of a checkpoint or of an export, for which torch and safetensors suffice (and timm, where the
    target is one of its networks), its place in object storage (s3://..., read with the credentials of the
    environment), ``zoo:NAME``, which comes with this package (see dircluster.zoo), or an MLflow URI such as
    ``models:/dir-digits@champion`` or ``runs:/RUN_ID/defense``, looked up at ``tracking_uri`` (MLFLOW_TRACKING_URI, or
    runs/mlflow.db, when not given). Only with ``trust_code`` a target or a defense of one's own is imported. Raises
    dircluster.config.ConfigError where the defense is missing, damaged, or none.
    """
    from dircluster.config import ConfigError, StorageConfig, local_path
    from dircluster.training.export import load_defense_folder, load_shipped
    from dircluster.zoo import is_shipped

    if is_shipped(str(uri)):
        return load_shipped(str(uri))

    text = str(uri)
    if "\0" in text:
        raise ConfigError(f"{text!r} names nothing: no name holds a zero byte")
    if "\n" in text or "\r" in text:
        raise ConfigError(f"{text!r} names nothing: it holds a line break")
    try:
        if text.startswith(("models:/", "runs:/")):
            from dircluster.cluster.tracking.registry import fetch

            return load_defense_folder(fetch(text, tracking_uri), trust_code=trust_code)
        if text.startswith("s3://"):
            from dircluster.cluster.storage import check_bucket, open_path

            check_bucket(text, StorageConfig(), name=text)
            return load_defense_folder(open_path(text, StorageConfig()), trust_code=trust_code)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{text} cannot be fetched: {error.name} is not installed") from error
    return load_defense_folder(uri if isinstance(uri, Path) else local_path(text), trust_code=trust_code)


def load_model(
    model_name: str,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    *,
    tracking_uri: str | None = None,
    trust_code: bool = False,
) -> Defended:
    """A finished defense by RobustBench's signature: ``load_model("dir", "cifar10", "Linf")``.

    First from the zoo of this package, then the champion ``NAME-DATASET``, or ``NAME``, of MLflow's registry, if it is
    of that data set and threat; the rest is as in :func:`load_defense`. Raises dircluster.config.ConfigError where
    there is none.
    """
    from dircluster.zoo import model_of, no_model

    dataset, threat = (str(getattr(name, "value", name)) for name in (dataset, threat_model))  # its enumerations too
    threat = {"linf": "Linf", "l2": "L2"}.get(threat.lower(), threat)
    shipped = model_of(model_name, dataset, threat)
    if shipped is not None:
        return load_defense(shipped)
    if find_spec("mlflow") is not None:
        from dircluster.cluster.tracking.registry import find_champion

        uri = find_champion([f"{model_name}-{dataset}", model_name], dataset, threat, tracking_uri)
        if uri is not None:
            return load_defense(uri, tracking_uri=tracking_uri, trust_code=trust_code)
    raise no_model(model_name, dataset, threat)
