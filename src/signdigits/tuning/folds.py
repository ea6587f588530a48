"""Cross-validation, for few photographs: each is judged, and tested, by a network that was trained on other folds.

Hastie, Tibshirani and Friedman, "The elements of statistical learning", 2009, 7.10. What is tested on a fold is the whole procedure:
its trial is chosen by the other folds, so that no photograph chooses what reports on it (Varma and Simon, "Bias in error
estimation when using cross-validation for model selection", 2006).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import mlflow
import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial
from scipy.special import logsumexp

from signdigits.config import Hyperparameters
from signdigits.data.loading import Data, Features
from signdigits.model import input_pipeline, training, transfer
from signdigits.model.calibration import Calibration, fit_temperature
from signdigits.model.outliers import find_quantile
from signdigits.tracking import runs
from signdigits.tuning.choice import choose_trial, log_scores, read_scores
from signdigits.tuning.study import Search

# Columns of the table of a trial's scores.
LOGIT = "logit {}"  # by class
DISTANCE = "outlier_distance"  # in spacings of the features


@dataclass(frozen=True)
class FoldModel:
    """A network that was trained on the other folds, its calibration, and the paths of the photographs that it tests."""

    fitted: training.Fit
    calibration: Calibration
    data: Data
    paths: tuple[str, ...]


def cross_validate(trial: optuna.Trial, search: Search, data: Data, hyperparameters: Hyperparameters) -> float:
    """Train on all folds but one, for each, and return the study's metric over all photographs, each judged once.

    A trial is not pruned: a fold says little about the next. The run's learning curves are those of the first fold.
    """
    metric = search.parameters.metric
    folds, tables, accuracies = data.folds(), list[pd.DataFrame](), list[float]()
    network = training.new_network(folds[0], folds[0].training, hyperparameters)
    initial = network.get_weights()
    for number, fold in enumerate(folds, start=1):
        # To compile another head takes as long as to train it.
        if isinstance(data.fitting, Features) and not hyperparameters.ema_momentum:
            training.reset_network(network, initial)
        elif number > 1:
            network = training.new_network(fold, fold.training, hyperparameters)
        copies, mirrored = metric.startswith("robust"), search.space.includes_mirror_images()
        scores = training.ValidationScores(fold.validation, {hyperparameters.epochs}, copies=copies, mirrored=mirrored)
        fitted = training.fit_network(
            network, fold.training, None, hyperparameters, callbacks=[scores], is_logged=number == 1
        )
        logits = pd.DataFrame(scores.logits, columns=list(map(LOGIT.format, data.dataset.class_names)))
        detector = training.fit_detector(fitted, fold.training)
        _, features = training.compute_outputs(
            fitted, input_pipeline.validation_batches(fold.validation, input_pipeline.CHUNK)
        )
        distances = detector.with_threshold(detector.measure_spacing()).score(features)
        table = pd.DataFrame(scores.by_image | {DISTANCE: distances}).join(logits)
        tables.append(table.set_index(fold.split.validation))
        accuracies.append(fitted.last("accuracy"))
    table = pd.concat(tables).sort_index()
    log_scores(data, table.index.to_numpy(), {str(name): column.to_numpy() for name, column in table.items()})
    labels, outputs = data.fitting.y, table[logits.columns].to_numpy()
    results = {
        "accuracy": float(np.mean(accuracies)),
        "val_accuracy": float((outputs.argmax(axis=1) == labels).mean()),
        "val_loss": float(np.mean(logsumexp(outputs, axis=1) - outputs[np.arange(len(labels)), labels])),
        metric: float(table[metric.rpartition("_")[2]].mean()),
        "temperature": fit_temperature(outputs, labels),
    }
    mlflow.log_metrics(results | {"folds": len(folds)})
    results |= {"outlier_threshold": find_quantile(table[DISTANCE].to_numpy(float)), "outlier_spacing": 1.0}
    for name, result in results.items():
        trial.set_user_attr(name, result)
    runs.check_recorded(asdict(hyperparameters), "accuracy", hyperparameters.epochs)
    mlflow.set_tag("trial_state", "COMPLETE")
    return results[metric]


def fit_folds(search: Search) -> Iterator[FoldModel]:
    """Yield a model for each fold: its trial chosen, its network trained and its temperature fitted on the others."""
    data, names = search.data, search.data.dataset.class_names
    for held in data.split.folds:
        paths = tuple(data.dataset.photographs[number].path for number in held)
        others = {photograph.path for photograph in data.dataset.photographs}.difference(paths)
        trial: FrozenTrial = choose_trial(search.study, search.parameters.metric, others).trial
        hyperparameters = search.space.complete(trial.params)
        frozen = transfer.freeze_features(data, hyperparameters)
        fold = next(fold for fold in frozen.folds() if np.array_equal(fold.split.validation, held))
        network = training.new_network(fold, fold.training, hyperparameters)
        fitted = training.fit_network(network, fold.training, None, hyperparameters, is_logged=False)
        table = read_scores(trial)
        table = table[table["path"].isin(others)]
        logits = table[list(map(LOGIT.format, names))].to_numpy(float)
        temperature = fit_temperature(logits, np.array([names.index(name) for name in table["class"]]))
        detector = training.fit_detector(fitted, fold.training)
        detector = detector.with_threshold(find_quantile(table[DISTANCE].to_numpy(float)) * detector.measure_spacing())
        yield FoldModel(fitted, Calibration(temperature, detector), fold, paths)
