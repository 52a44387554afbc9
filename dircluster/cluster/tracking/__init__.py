"""MLflow: records of jobs, and the model registry."""

import logging

logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it shows a page of what it raises anyway
