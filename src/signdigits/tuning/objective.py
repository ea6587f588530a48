"""The objective that Optuna optimizes: a trial trains the network once, in a nested MLflow run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import keras
import mlflow
import optuna

from signdigits.data import lineage
from signdigits.data.loading import Data
from signdigits.model import training
from signdigits.tracking import runs
from signdigits.tuning.study import FAILURE_REASON, Search


def objective(trial: optuna.Trial, search: Search) -> float:
    """Train with the hyperparameters that the trial suggests, and return the metric that the study optimizes."""
    data, metric = search.data, search.parameters.metric
    with _trial_run(trial, search):
        hyperparameters = search.space.suggest(trial)
        mlflow.log_params(asdict(hyperparameters))
        network = training.new_network(data.training, data.n_classes, hyperparameters)
        pruning = Pruning(trial, metric)
        callbacks = [*_measure_robustness(search), pruning]
        fitted = training.fit_network(network, data.training, data.validation, hyperparameters, callbacks=callbacks)
        _log_result(trial, fitted, data, pruned=pruning.pruned)
    if pruning.pruned:
        raise optuna.TrialPruned
    return fitted.last(metric)


@contextmanager
def _trial_run(trial: optuna.Trial, search: Search) -> Iterator[None]:
    """Open the nested run of a trial; an exception becomes the trial's failure reason."""
    tags = {"trial": trial.number, "study": search.study.study_name} | trial.user_attrs
    try:
        with runs.start_run("trial", f"trial-{trial.number:03d}", parent_run_id=search.run_id, tags=tags) as run:
            trial.set_user_attr("mlflow_run_id", run.info.run_id)
            lineage.log_data(search.data, parts=("training", "validation"))
            yield
    except Exception as error:
        trial.set_user_attr(FAILURE_REASON, f"{type(error).__name__}: {error}"[:2000])
        raise


def _measure_robustness(search: Search) -> list[keras.callbacks.Callback]:
    """Return the callback that measures robust_accuracy, if the study optimizes it."""
    if search.parameters.metric != "robust_accuracy":
        return []
    return [training.RobustAccuracy(search.data.validation, mirrored=search.space.includes_mirror_images())]


def _log_result(trial: optuna.Trial, fitted: training.Fit, data: Data, *, pruned: bool) -> None:
    """Log the last epoch and the calibration to the trial and its run, and check that MLflow logged the rest."""
    for metric in fitted.history.keys() & {"accuracy", "val_accuracy", "val_loss", "robust_accuracy"}:
        trial.set_user_attr(metric, fitted.last(metric))
    if not pruned:  # a pruned trial is never refitted
        calibration = training.calibrate_network(fitted, data.training, data.validation)
        trial.set_user_attr("temperature", calibration.temperature)
        trial.set_user_attr("outlier_threshold", calibration.detector.threshold)
        mlflow.log_metric("temperature", calibration.temperature)
    mlflow.log_metric("val_loss_fluctuation", training.loss_fluctuation(fitted.history["val_loss"]))
    mlflow.set_tag("trial_state", "PRUNED" if pruned else "COMPLETE")
    runs.check_recorded(asdict(fitted.hyperparameters), "val_accuracy", len(fitted.history["val_accuracy"]))


class Pruning(keras.callbacks.Callback):
    """Reports each epoch to the trial, and stops the training (early stopping) if the pruner prunes it.

    It does not raise TrialPruned, as optuna-integration's callback does: autologging writes its last metrics after `fit`.
    """

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        super().__init__()
        self.trial, self.metric, self.pruned = trial, metric, False

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.trial.report((logs or {})[self.metric], step=epoch + 1)
        last = epoch + 1 == self.params["epochs"]
        if not last and self.trial.should_prune():
            self.pruned = self.model.stop_training = True
