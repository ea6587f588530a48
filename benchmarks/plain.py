"""The baseline: the same network in plain Keras, with MLflow's default autologging."""

import keras
import mlflow
import mlflow.tensorflow

from signdigits.config import Hyperparameters
from signdigits.data import loading
from signdigits.model import architecture


def compiled(loaded: loading.Data, hyperparameters: Hyperparameters, precision: str = "float32") -> keras.Model:
    """The notebook's network, new."""
    keras.utils.set_random_seed(hyperparameters.seed)
    network = architecture.build_network(loaded.training.shape, len(loaded.dataset.class_names), precision=precision)
    architecture.compile_network(network, hyperparameters)
    return network


def run(loaded: loading.Data, hyperparameters: Hyperparameters, precision: str = "float32") -> list[float]:
    """A training in a nested run, with autolog's defaults; the validation accuracy of each epoch."""
    mlflow.tensorflow.autolog(disable=False)
    with mlflow.start_run(nested=True):
        history = compiled(loaded, hyperparameters, precision).fit(
            loaded.training.x, loaded.training.y, batch_size=128, epochs=hyperparameters.epochs, verbose=0,
            validation_data=(loaded.validation.x, loaded.validation.y),
        ).history  # fmt: skip
    accuracies: list[float] = history["val_accuracy"]
    return accuracies
