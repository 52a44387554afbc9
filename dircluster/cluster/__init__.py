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


def _reach_this_machine() -> None:
    """Ask servers on this machine (make cluster) directly, where a proxy is set and NO_PROXY does not say so."""
    if any(
        os.environ.get(form(f"{name}_proxy")) for name in ("http", "https", "all") for form in (str.lower, str.upper)
    ):
        named = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
        known = [host.strip() for host in named if host.strip()]
        hosts = known if "*" in known else dict.fromkeys([*known, "localhost", "127.0.0.1", "::1"])
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


_reach_this_machine()
if "RAY_ADDRESS" in os.environ:
    os.environ["RAY_ADDRESS"] = os.environ["RAY_ADDRESS"].strip()  # Ray takes blanks for an address
