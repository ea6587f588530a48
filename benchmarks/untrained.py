"""A model whose answers do not matter, for what measures how fast they come."""

import keras
from mlflow.models.model import ModelInfo

from signdigits.config import Hyperparameters
from signdigits.data import loading
from signdigits.model import training
from signdigits.packaging import package
from signdigits.tracking import runs


def log_untrained(loaded: loading.Data, network: keras.Sequential | None = None) -> ModelInfo:
    """Log a network that has learnt nothing, the notebook's unless another is given."""
    with runs.start_run("train", "train"):
        network = network or training.new_network(loaded.image_shape, loaded.n_classes, Hyperparameters())
        fitted = training.Fit(network, {}, Hyperparameters())
        calibration = training.calibrate_network(fitted, loaded.training, loaded.validation)
        return package.log_model(network, calibration, loaded, {})
