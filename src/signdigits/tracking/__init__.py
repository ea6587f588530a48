"""MLflow: runs, the tracking store and the model registry."""
