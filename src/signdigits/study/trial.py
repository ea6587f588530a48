"""One trial: what the study drew is fitted in a nested MLflow run. The same on a laptop and on a machine of a cluster."""

from dataclasses import asdict, dataclass, field

import keras
import mlflow
import optuna
from optuna.trial import TrialState

from signdigits import tracking, train
from signdigits.hyperparameters import Space
from signdigits.network.workbench import Workbench
from signdigits.photographs.data import Data
from signdigits.study.outcome import FAILED, REASON, Outcome
from signdigits.study.shorter import INFERRED, Shorter


@dataclass(frozen=True)
class Task:
    """What the trials of a study have in common."""

    study_name: str
    run_id: str  # the study's, under which theirs are nested
    data: Data
    space: Space
    objective: str
    workbench: Workbench = field(default_factory=Workbench)


def run_trial(task: Task, trial: optuna.Trial) -> Outcome:
    """Fit what `trial` has drawn, in a nested run, and note on it what a later choice needs, or why it failed."""
    try:
        return fit_trial(task, trial)
    except Exception as error:
        trial.set_user_attr(REASON, f"{type(error).__name__}: {error}"[:2000])
        return FAILED


def fit_trial(task: Task, trial: optuna.Trial) -> Outcome:
    data, objective = task.data, task.objective
    hyperparameters = task.space.complete(trial.params)
    tags = {"trial": trial.number, "study": task.study_name, "trial_state": "RUNNING"} | trial.user_attrs
    tags |= tracking.data_tags(data.dataset, data.split)
    with tracking.run("trial", f"trial-{trial.number:03d}", parent_run_id=task.run_id, tags=tags) as run:
        trial.set_user_attr("mlflow_run_id", run.info.run_id)
        mlflow.log_params(asdict(hyperparameters))
        pruning, shorter = Pruning(trial, objective), Shorter(objective, task.space.ends("epochs")[0])
        try:
            fitted = train.fit(
                data.training,
                data.validation,
                len(data.dataset.class_names),
                hyperparameters,
                workbench=task.workbench,
                callbacks=[pruning, shorter],
                title=f"trial {trial.number}",
            )
        except BaseException as error:
            mlflow.set_tag("trial_state", "FAIL" if isinstance(error, Exception) else "INTERRUPTED")
            raise
        for name in ("val_accuracy", "val_loss"):
            trial.set_user_attr(name, fitted.last(name))
        trial.set_user_attr("temperature", fitted.temperature)
        fluctuation = train.fluctuation(fitted.history["val_loss"])
        found = {"val_loss_fluctuation": fluctuation, "temperature": fitted.temperature}
        if inferred := shorter.inferred(data.validation):
            trial.set_user_attr(INFERRED, inferred)
            found |= {f"inferred_{name}": float(value) for name, value in inferred.items()}
        mlflow.log_metrics(found)
        mlflow.set_tag("trial_state", "PRUNED" if pruning.pruned else "COMPLETE")
    if pruning.pruned:
        return Outcome(TrialState.PRUNED)
    return Outcome(TrialState.COMPLETE, fitted.last(objective))


class Pruning(keras.callbacks.Callback):
    """Reports each epoch to the trial, and stops the training where the pruner says so.

    It does not raise: what autologging has not written yet would be lost.
    """

    def __init__(self, trial: optuna.Trial, objective: str) -> None:
        super().__init__()
        self.trial, self.objective, self.pruned = trial, objective, False

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.trial.report((logs or {})[self.objective], step=epoch + 1)
        last = epoch + 1 == self.params["epochs"]
        if not last and self.trial.should_prune():
            self.pruned = True
            self.model.stop_training = True
