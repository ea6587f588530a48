"""A worker whose trials sleep; in a module that imports no TensorFlow, so that many fit on one machine."""

import time

import mlflow
import optuna
from optuna.trial import TrialState
from signdigits.study import crew
from signdigits.study.outcome import Outcome

from signdigits import tracking

SECONDS = 10.0  # that a trial sleeps


class Sleeper(crew.Worker):
    """A worker whose trials sleep. It needs no photographs and no TensorFlow."""

    def get_ready(self) -> bool:
        mlflow.set_tracking_uri(self.job.tracking_uri)
        mlflow.set_experiment(experiment_id=self.job.experiment_id)
        return self.study is not None

    def run(self, trial_id: int) -> Outcome:
        one = optuna.Trial(self.study, trial_id)
        tags = {"trial": one.number, "study": self.job.study_name}
        with (
            crew.signs_of_life(self.storage, trial_id),
            tracking.run("trial", f"trial-{one.number:03d}", parent_run_id=self.job.run_id, tags=tags) as run,
        ):
            one.set_user_attr("mlflow_run_id", run.info.run_id)
            mlflow.log_params(one.params)
            time.sleep(SECONDS)
            one.report(0.5, 1)
            mlflow.log_metric("val_accuracy", 0.5)
        for name in ("val_accuracy", "val_loss", "temperature"):
            one.set_user_attr(name, 0.5)
        return Outcome(TrialState.COMPLETE, 0.5)
