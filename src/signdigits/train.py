"""Fit the network once.

    python -m signdigits train --data FOLDER --initial_learning_rate 0.005 --decay_rate 0.96 --epochs 8
    mlflow run . -e train -P epochs=8

`fit` never opens a run: a training, a trial and the final refit each bring their own.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import keras
import mlflow
import mlflow.tensorflow
import numpy as np
from tqdm import tqdm

from signdigits import plots, tracking
from signdigits.artifact import package
from signdigits.errors import TrainingDiverged
from signdigits.hyperparameters import Hyperparameters
from signdigits.measures import calibrate
from signdigits.network import batches, model
from signdigits.network.workbench import Workbench
from signdigits.photographs.data import Data, Images

log = logging.getLogger(__name__)

CHUNK = 128  # images in one forward pass outside of `fit`: bounds the memory that it takes


@dataclass(frozen=True)
class Fit:
    """A fitted network, and what each epoch measured: accuracy, loss and, with validation images, val_*.

    `temperature` calibrates its probabilities (see calibrate.py); 1 without validation images to fit it on.
    """

    trained: keras.Sequential  # in the precision that it was trained in
    history: dict[str, list[float]]
    temperature: float
    hyperparameters: Hyperparameters

    def last(self, metric: str) -> float:
        return self.history[metric][-1]

    def network(self) -> keras.Sequential:
        """The fitted network, computing in float32 whatever it was trained in; its weights always were float32."""
        shape, n_classes = self.trained.input_shape[1:], self.trained.output_shape[-1]
        blocks, dropout = self.hyperparameters.conv_blocks, self.hyperparameters.dropout
        network = model.build(shape, n_classes, conv_blocks=blocks, dropout=dropout)
        for mine, theirs in zip(network.trainable_variables, self.trained.trainable_variables, strict=True):
            mine.assign(theirs)
        return network


def train(data: Data, hyperparameters: Hyperparameters) -> str:
    """Fit on the training images in a run of its own, log a model that can be served, and return the run's id.

    Raises TrainingDiverged, leaving the run FAILED with its reason, if the loss is no longer a number.
    """
    with tracking.run("train", "train") as run:
        tracking.log_params(asdict(data.parameters) | asdict(hyperparameters))
        tracking.log_data(data, parts=("training", "validation"))
        tracking.log_versions()
        fitted = fit(data.training, data.validation, len(data.dataset.class_names), hyperparameters)
        log_curves(fitted)
        mlflow.log_metric("temperature", fitted.temperature)
        package.log_model(fitted.network(), fitted.temperature, data, {"val_accuracy": fitted.last("val_accuracy")})
        score = [fitted.last("val_loss"), fitted.last("val_accuracy")]
        log.info("Validation score [loss, accuracy]: %s", [round(value, 4) for value in score])
        log.info("run %s; score it on the test images with: python -m signdigits evaluate %s", run.info.run_id,
            f"--data {data.parameters.data} --run_id {run.info.run_id}")  # fmt: skip
        return run.info.run_id


def fit(
    training: Images,
    validation: Images | None,
    n_classes: int,
    hyperparameters: Hyperparameters,
    *,
    workbench: Workbench | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    title: str = "",
) -> Fit:
    """Train the notebook's network, autologged into the active run.

    With a `workbench` the network is one of its: the next fit on it trains the same one.

    Same seed, images, machine and versions give the same result. Raises TrainingDiverged when the loss of a
    batch is no longer a finite number.
    """
    precision = model.resolve_precision(hyperparameters.precision)
    mlflow.set_tag("precision", precision)
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(hyperparameters.seed)  # after MLflow, which draws from the same generator
    bench = workbench or Workbench()
    network = bench.network(training.shape, n_classes, hyperparameters, precision)
    # Of autolog's 14.6 s a run, nearly all is checkpoints, a stock model saved beside ours, and a second Python
    # that imports TensorFlow to list requirements. Parameters and metrics of every epoch stay.
    mlflow.tensorflow.autolog(log_models=False, log_datasets=False, checkpoint=False)
    history = network.fit(
        **batches.training(training, hyperparameters.batch_size, hyperparameters.augmentation, hyperparameters.seed),
        **batches.validation(validation, hyperparameters.batch_size),
        epochs=hyperparameters.epochs,
        callbacks=[keras.callbacks.TerminateOnNaN(), *callbacks, Progress(title)],
        verbose=0,
    ).history
    for name in sorted(history.keys() & {"loss", "val_loss"}):  # the last step of an epoch may spoil val_loss alone
        if not np.isfinite(history[name]).all():
            raise TrainingDiverged(
                f"{name} became {history[name][-1]} in epoch {len(history[name])} with initial_learning_rate="
                f"{hyperparameters.initial_learning_rate}; lower it"
            )
    return Fit(network, history, temperature(network, validation) if validation else 1.0, hyperparameters)


def temperature(network: keras.Sequential, images: Images) -> float:
    """What calibrates the network's probabilities on `images`, which it was not trained on."""
    starts = range(0, len(images), CHUNK)
    logits = [np.asarray(network(images.x[start : start + CHUNK], training=False)) for start in starts]
    return calibrate.fit_temperature(np.concatenate(logits), images.y)


def log_curves(fitted: Fit) -> None:
    """Log the learning curves and, where there were validation images, how much their loss went up and down."""
    mlflow.log_figure(plots.learning_curves(fitted.history), "learning_curves.png")
    if "val_loss" in fitted.history:
        mlflow.log_metric("val_loss_fluctuation", fluctuation(fitted.history["val_loss"]))


def fluctuation(losses: Sequence[float]) -> float:
    """How far a loss curve climbs on its way down: the sum of its rises from epoch to epoch, 0 for a smooth decline.

    For the notebook's three curves it is 0.195, 0.084 and 0.000, the order in which its author saw them settle.
    """
    return float(np.clip(np.diff(losses), 0, None).sum())


class Progress(keras.callbacks.Callback):
    """Shows the epoch, its metrics and the time left: a bar on a terminal, a line an epoch elsewhere.

    With a title the bar vanishes at the end and no lines are printed: the search prints one line a trial.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self.started = time.monotonic()
        total = self.params["epochs"] * self.params["steps"]
        self.bar = tqdm(total=total, desc=self.title, unit="step", leave=not self.title, disable=None)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.bar.update()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        done, epochs = epoch + 1, self.params["epochs"]
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in (logs or {}).items())
        self.bar.set_description(f"{self.title} epoch {done}/{epochs}".strip())
        self.bar.set_postfix_str(metrics)
        if not self.title and not sys.stderr.isatty():
            left = (time.monotonic() - self.started) / done * (epochs - done)
            log.info("epoch %*d/%d  %s  %.0f s left", len(str(epochs)), done, epochs, metrics, left)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self.bar.close()
