"""Every knob of a run, as frozen dataclasses: a config is a value that is checked when it is made.

This package imports the standard library alone, so that ``--help`` and a config error answer at once.
Numbers in [0, 1] are in units of the pixel range; epochs are passes over the training split.
"""

from __future__ import annotations

from dircluster.config.errors import (
    ANY_ERROR,
    LONGEST,
    ConfigError,
    StoppedError,
    error_from_plain,
    error_to_plain,
    first_line,
    named_line,
    refuse_secret,
    require,
    require_positive,
    require_share,
    without_secrets,
)
from dircluster.config.evaluation import USUAL_ROWS, EvaluationConfig, SuiteName
from dircluster.config.places import ParallelConfig, ScalingConfig, StorageConfig, TrackingConfig
from dircluster.config.run import (
    LATER_FIELDS,
    SAME_NUMBERS,
    RunConfig,
    as_by_itself,
    as_hashed,
    check_schedules,
    varied,
    with_lengths_of,
)
from dircluster.config.sections import (
    ARCHITECTURES,
    HOW_TRAINED,
    LEAST_STD,
    AttackConfig,
    DataConfig,
    OptimizerConfig,
    TargetConfig,
    TrainingConfig,
    is_own_code,
)
from dircluster.config.serialize import (
    as_path,
    digest,
    flatten,
    from_dict,
    local_path,
    real_path,
    short,
    to_dict,
    with_values,
)

__all__ = [
    "ANY_ERROR",
    "ARCHITECTURES",
    "HOW_TRAINED",
    "LATER_FIELDS",
    "LEAST_STD",
    "LONGEST",
    "SAME_NUMBERS",
    "USUAL_ROWS",
    "AttackConfig",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScalingConfig",
    "StoppedError",
    "StorageConfig",
    "SuiteName",
    "TargetConfig",
    "TrackingConfig",
    "TrainingConfig",
    "as_by_itself",
    "as_hashed",
    "as_path",
    "check_schedules",
    "digest",
    "error_from_plain",
    "error_to_plain",
    "first_line",
    "flatten",
    "from_dict",
    "is_own_code",
    "local_path",
    "named_line",
    "real_path",
    "refuse_secret",
    "require",
    "require_positive",
    "require_share",
    "short",
    "to_dict",
    "varied",
    "with_lengths_of",
    "with_values",
    "without_secrets",
]
