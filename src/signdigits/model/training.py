"""Build and fit the network in a training, a trial or a refit."""

import logging
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import keras
import mlflow
import mlflow.tensorflow
import numpy as np
import tensorflow as tf
from scipy.special import logsumexp
from tqdm import tqdm

from signdigits import plots
from signdigits.config import Hyperparameters
from signdigits.data.loading import Data, Features, Images
from signdigits.data.start import Start
from signdigits.errors import TrainingDiverged
from signdigits.model import architecture, calibration, input_pipeline, transfer
from signdigits.model.augmentation import Augmentation
from signdigits.model.calibration import Calibration
from signdigits.model.input_pipeline import CHUNK
from signdigits.model.outliers import Detector, choose_known
from signdigits.model.transfer import COPIES

log = logging.getLogger(__name__)

# Of the changed copies of the validation images: one yardstick for all trials, whatever they train with.
VALIDATION_AUGMENTATION = Augmentation(geometric=1.5, photometric=1.0)
MAX_COPIES = 3000  # of all together, or one of each: more would not tell trials apart better


@dataclass(frozen=True)
class Fit:
    """A fitted network and its history: accuracy, loss and, with validation images, val_* of each epoch."""

    network: keras.Model  # in its training precision
    history: dict[str, list[float]]
    hyperparameters: Hyperparameters

    def last(self, metric: str) -> float:
        return self.history[metric][-1]

    def in_float32(self, start: Start | None = None) -> keras.Model:
        """Return the network with float32 computation; its weights are float32 in any precision.

        One that was trained from `start` has that network's blocks before its head.
        """
        if start:
            is_head = len(self.network.input_shape) == 2
            return transfer.join_head(start, self.network) if is_head else self.network
        shape, n_classes = self.network.input_shape[1:], self.network.output_shape[-1]
        network = architecture.build_network(shape, n_classes, self.hyperparameters)
        network.set_weights(self.network.get_weights())
        return network


def new_network(data: Data, images: Images, hyperparameters: Hyperparameters) -> keras.Model:
    """Build and compile a network for a training on `images` of `data`, from the seed in `hyperparameters`.

    If `data` has a model to start from, with its weights, or, for features that it computed, only a new head.
    Its precision becomes a tag of the active run.
    """
    precision = "float32" if data.start else architecture.resolve_precision(hyperparameters.precision)
    mlflow.set_tag("precision", precision)
    # Keras and TensorFlow keep the graphs of earlier networks. Python frees them in its own time: to force it takes a second.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(hyperparameters.seed)  # after MLflow, which draws from the same generator
    if isinstance(images, Features):
        network = transfer.new_head(images.n_features, data.n_classes, hyperparameters)
    elif data.start:
        network = transfer.new_network(data.start, data.dataset.class_names, hyperparameters)
    else:
        network = architecture.build_network(
            images.shape, data.n_classes, hyperparameters, precision, for_training=True
        )
    steps = input_pipeline.steps_per_epoch(images, hyperparameters.batch_size)
    # A step of a head takes less than to start it: an epoch is one execution.
    together = steps if isinstance(images, Features) else 1
    architecture.compile_network(network, hyperparameters, hyperparameters.epochs * steps, together)
    return network


def reset_network(network: keras.Model, weights: Sequence[np.ndarray]) -> None:
    """Give a compiled network these weights, and its optimizer the state of the first step: it can be fitted anew.

    Not with a moving average of the weights, which would begin at 0.
    """
    network.set_weights(weights)
    for variable in network.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))


def fit_network(
    network: keras.Model,
    training: Images,
    validation: Images | None,
    hyperparameters: Hyperparameters,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    is_logged: bool = True,
) -> Fit:
    """Train a new network, autologged to the active run if `is_logged`.

    The same seed, images, machine and versions give the same result. Raises TrainingDiverged if a loss is no longer a
    finite number.
    """
    # Of autolog's 14.6 s a run, nearly all is checkpoints, a stock model saved beside ours, and a second Python
    # that imports TensorFlow to list requirements. Parameters and metrics of every epoch stay.
    mlflow.tensorflow.autolog(log_models=False, log_datasets=False, checkpoint=False, disable=not is_logged)
    batch_size = hyperparameters.batch_size
    averaging = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if hyperparameters.ema_momentum else []
    validating = [Validation(validation, batch_size)] if validation else []
    # A head on features takes a second.
    progress = [] if isinstance(training, Features) else [ProgressBar()]
    history = network.fit(
        input_pipeline.training_batches(training, batch_size, Augmentation.of(hyperparameters), hyperparameters.seed),
        steps_per_epoch=input_pipeline.steps_per_epoch(training, batch_size),
        epochs=hyperparameters.epochs,
        # The pipeline shuffles and batches; autolog records these two, and would record a batch_size of None.
        shuffle=False,
        batch_size=batch_size,
        callbacks=[keras.callbacks.TerminateOnNaN(), *averaging, *validating, *callbacks, *progress],
        verbose=0,
    ).history
    for name in sorted(
        history.keys() & {"loss", "val_loss"}
    ):  # after the last step of an epoch only val_loss may be affected
        if not np.isfinite(history[name]).all():
            raise TrainingDiverged(
                f"{name} became {history[name][-1]} in epoch {len(history[name])} with initial_learning_rate="
                f"{hyperparameters.initial_learning_rate}; lower it"
            )
    return Fit(network, history, hyperparameters)


def calibrate_network(fitted: Fit, training: Images, validation: Images) -> Calibration:
    """Fit the temperature on validation images; the outlier detector on training images, its threshold on validation images."""
    detector = fit_detector(fitted, training)
    logits, features = compute_outputs(fitted, input_pipeline.validation_batches(validation, CHUNK))
    temperature = calibration.fit_temperature(logits, validation.y)
    return Calibration(temperature, detector.with_threshold(detector.find_threshold(features)))


def fit_detector(fitted: Fit, training: Images) -> Detector:
    """Fit the outlier detector to the features of training images: those of `choose_known`.

    Behind them, to those of their mirror images, if the network was trained on mirror images.
    """
    chosen = choose_known(len(training))
    batches = input_pipeline.validation_batches(training, CHUNK, chosen=chosen)
    if fitted.hyperparameters.horizontal_flip:
        mirrored = Augmentation(horizontal_flip=1.0)
        batches = batches.concatenate(input_pipeline.validation_batches(training, CHUNK, mirrored, chosen))
    _, features = compute_outputs(fitted, batches)
    return Detector.fit(features)


def compute_outputs(fitted: Fit, batches: tf.data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return logits, of shape (n, classes), and features, of shape (n, features), of all images of the batches."""
    model = architecture.with_features(fitted.network)
    outputs = np.concatenate([np.asarray(model(x, training=False)) for x, _ in batches])
    logits, features = np.split(outputs, [fitted.network.output_shape[-1]], axis=1)
    return logits, features


def log_curves(fitted: Fit) -> None:
    """Log the learning curves and, with validation images, the fluctuation of their loss."""
    mlflow.log_figure(plots.plot_learning_curves(fitted.history), "learning_curves.png")
    if "val_loss" in fitted.history:
        mlflow.log_metric("val_loss_fluctuation", loss_fluctuation(fitted.history["val_loss"]))


def loss_fluctuation(losses: Sequence[float]) -> float:
    """Return the sum of a curve's rises from epoch to epoch: 0 for a smooth decline.

    For the notebook's three curves it is 0.195, 0.084 and 0.000, the order in which its author saw them settle.
    """
    return float(np.clip(np.diff(losses), 0, None).sum())


class Validation(keras.callbacks.Callback):
    """Evaluate the validation images after each epoch, as `validation_data` would.

    MLflow's autologging records each metric of `validation_data` twice, as `val_accuracy` and as `validation_accuracy`.
    """

    def __init__(self, images: Images, batch_size: int) -> None:
        super().__init__()
        self.batches = input_pipeline.validation_batches(images, batch_size)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        metrics = self.model.evaluate(self.batches, verbose=0, return_dict=True)
        logs.update({f"val_{name}": value for name, value in metrics.items()})


class ValidationScores(keras.callbacks.Callback):
    """Score the validation images after each of `epochs`, with changed copies of each if `copies`, the same each time.

    Adds the Brier score to the logs: val_brier or, where an image counts as much as its copies together, robust_brier, beside
    robust_accuracy. With `mirrored`, half of the copies are mirror images. `by_image` are the scores of each image after the last
    of the epochs, arrays of shape (images,).
    """

    def __init__(self, validation: Images, epochs: Collection[int], *, copies: bool, mirrored: bool) -> None:
        super().__init__()
        self.labels, self.epochs, self.is_robust = validation.y, epochs, copies
        self.batches = input_pipeline.validation_batches(validation, CHUNK)
        if copies:
            n_copies = int(np.clip(MAX_COPIES // len(validation), 1, COPIES))
            augmentation = replace(VALIDATION_AUGMENTATION, horizontal_flip=0.5 if mirrored else 0.0)
            chosen = np.tile(np.arange(len(validation)), n_copies)
            changed = input_pipeline.validation_batches(validation, CHUNK, augmentation, chosen)
            self.batches = self.batches.concatenate(changed.cache())  # in memory
        self.by_image: dict[str, np.ndarray] = {}
        self.logits = np.array([])  # of the images themselves, of shape (images, classes)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        if epoch + 1 not in self.epochs:
            return
        # Not `predict`, which would trace a graph of its own for each network.
        logits = np.concatenate([np.asarray(self.model(x, training=False)) for x, _ in self.batches])
        self.logits = logits[: len(self.labels)]
        log_probabilities = logits - logsumexp(logits, axis=1, keepdims=True)
        labels = np.tile(self.labels, len(logits) // len(self.labels))
        expected = np.eye(logits.shape[1])[labels]
        scores = {
            "accuracy": logits.argmax(axis=1) == labels,
            "loss": -(expected * log_probabilities).sum(axis=1),
            "brier": ((np.exp(log_probabilities) - expected) ** 2).sum(axis=1),
        }
        self.by_image = {}
        for name, each in scores.items():
            own, *copies = each.reshape(-1, len(self.labels))
            self.by_image[name] = (own + np.mean(copies, axis=0)) / 2 if copies else own.astype(float)
        if self.is_robust:
            logs["robust_accuracy"] = float(self.by_image["accuracy"].mean())
        logs["robust_brier" if self.is_robust else "val_brier"] = float(self.by_image["brier"].mean())


class ProgressBar(keras.callbacks.Callback):
    """Show the epoch, its metrics and the time left: a bar on a terminal, a line an epoch elsewhere."""

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self.started = time.monotonic()
        total = self.params["epochs"] * self.params["steps"]
        self.bar = tqdm(total=total, unit="step", disable=None)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self.bar.update()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        done, epochs = epoch + 1, self.params["epochs"]
        metrics = "  ".join(f"{name} {value:.4f}" for name, value in (logs or {}).items())
        self.bar.set_description(f"epoch {done}/{epochs}")
        self.bar.set_postfix_str(metrics)
        if not sys.stderr.isatty():
            left = (time.monotonic() - self.started) / done * (epochs - done)
            log.info("epoch %*d/%d  %s  %.0f s left", len(str(epochs)), done, epochs, metrics, left)

    def on_train_end(self, logs: dict[str, float] | None = None) -> None:
        self.bar.close()
