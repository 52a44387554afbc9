"""The edge to Ray, MLflow and object storage: the only room that imports them."""

import os

for _name, _value in {
    "RAY_AUTH_MODE": "token",  # one ray.init() turns it on for later ones: say it always
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else prints appear twice
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the retry queue tries again by itself
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)  # both libraries read these when they are imported
