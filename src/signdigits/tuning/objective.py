"""The objective that Optuna optimizes: a trial trains the network once, in a nested MLflow run."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import mlflow
import optuna

from signdigits.config import METRICS
from signdigits.data import lineage
from signdigits.data.loading import Data, Images
from signdigits.model import training, transfer
from signdigits.tracking import runs
from signdigits.tuning.choice import log_scores
from signdigits.tuning.folds import cross_validate
from signdigits.tuning.study import FAILURE_REASON, RUNGS, Search


def objective(trial: optuna.Trial, search: Search) -> float:
    """Train with the hyperparameters that the trial suggests, and return the metric that the study optimizes."""
    with _trial_run(trial, search):
        hyperparameters = search.space.suggest(trial)
        mlflow.log_params(asdict(hyperparameters))
        data = transfer.freeze_features(search.data, hyperparameters)
        if data.split.folds:
            return cross_validate(trial, search, data, hyperparameters)
        network = training.new_network(data, data.training, hyperparameters)
        rungs = Rungs(trial, search, data.validation, hyperparameters.epochs)
        fitted = training.fit_network(network, data.training, data.validation, hyperparameters, callbacks=[rungs])
        _log_result(trial, fitted, rungs, data)
    if rungs.pruned:
        raise optuna.TrialPruned
    return fitted.last(search.parameters.metric)


@contextmanager
def _trial_run(trial: optuna.Trial, search: Search) -> Iterator[None]:
    """Open the nested run of a trial; an exception becomes the trial's failure reason."""
    tags = {"trial": trial.number, "study": search.study.study_name} | trial.user_attrs
    try:
        with runs.start_run("trial", f"trial-{trial.number:03d}", parent_run_id=search.run_id, tags=tags) as run:
            trial.set_user_attr("mlflow_run_id", run.info.run_id)
            mlflow.log_metric("trial", trial.number)  # the axes of MLflow's charts are metrics and parameters, not tags
            lineage.log_data(search.data, parts=("training", "validation"))
            yield
    except Exception as error:
        trial.set_user_attr(FAILURE_REASON, f"{type(error).__name__}: {error}"[:2000])
        raise


def _log_result(trial: optuna.Trial, fitted: training.Fit, rungs: "Rungs", data: Data) -> None:
    """Log the last epoch and the calibration to the trial and its run, and check that MLflow logged the rest."""
    for metric in fitted.history.keys() & {"accuracy", *METRICS}:
        trial.set_user_attr(metric, fitted.last(metric))
    log_scores(data, data.split.validation, rungs.by_image)
    if not rungs.pruned:  # a pruned trial is never refitted
        calibration = training.calibrate_network(fitted, data.training, data.validation)
        trial.set_user_attr("temperature", calibration.temperature)
        trial.set_user_attr("outlier_threshold", calibration.detector.threshold)
        trial.set_user_attr("outlier_spacing", calibration.detector.measure_spacing())
        mlflow.log_metric("temperature", calibration.temperature)
    mlflow.log_metric("val_loss_fluctuation", training.loss_fluctuation(fitted.history["val_loss"]))
    mlflow.set_tag("trial_state", "PRUNED" if rungs.pruned else "COMPLETE")
    runs.check_recorded(asdict(fitted.hyperparameters), "val_accuracy", len(fitted.history["val_accuracy"]))


class Rungs(training.ValidationScores):
    """Scores the validation images at each rung, reports the metric to the trial, and stops the training if it is pruned.

    It does not raise TrialPruned, as optuna-integration's callback does: autologging writes its last metrics after `fit`.
    """

    def __init__(self, trial: optuna.Trial, search: Search, validation: Images, epochs: int) -> None:
        self.percentages = {math.ceil(epochs * percentage / 100): percentage for percentage in RUNGS}
        self.trial, self.metric, self.pruned = trial, search.parameters.metric, False
        mirrored = search.space.includes_mirror_images()
        copies = self.metric.startswith("robust")
        super().__init__(validation, self.percentages, copies=copies, mirrored=mirrored)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        percentage = self.percentages.get(epoch + 1)
        if percentage:
            self.trial.report((logs or {})[self.metric], step=percentage)
            if percentage < RUNGS[-1] and self.trial.should_prune():
                self.pruned = self.model.stop_training = True
