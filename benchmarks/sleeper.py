"""A worker whose trials sleep, without TensorFlow, so that many fit on one machine."""

import time

import mlflow
import optuna

from signdigits.tracking import runs
from signdigits.tuning import executors

SECONDS = 10.0  # that a trial sleeps


class Sleeper(executors.TrialWorker):
    """A worker whose trials sleep. It needs no photographs and no TensorFlow."""

    def prepare(self) -> None:
        mlflow.set_tracking_uri(self.config.tracking_uri)
        mlflow.set_experiment(experiment_id=self.config.experiment_id)
        assert self.study is not None

    def objective(self, trial: optuna.Trial, name: str) -> float:
        self.config.space.suggest(trial)
        tags = {"trial": trial.number, "study": self.config.study_name}
        with runs.start_run("trial", f"trial-{trial.number:03d}", parent_run_id=self.config.run_id, tags=tags) as run:
            trial.set_user_attr("mlflow_run_id", run.info.run_id)
            mlflow.log_params(trial.params)
            time.sleep(SECONDS)
            trial.report(0.5, 1)
            mlflow.log_metric("val_accuracy", 0.5)
        for name in ("val_accuracy", "val_loss", "temperature"):
            trial.set_user_attr(name, 0.5)
        return 0.5
