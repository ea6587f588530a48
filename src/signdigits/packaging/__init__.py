"""The trained network as an MLflow model."""
