"""MLflow: records of jobs, and the model registry."""
