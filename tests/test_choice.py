"""The choice of the trial that is fitted again: rules on studies whose trials are recorded and not trained."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlflow
import mlflow.cli
import numpy as np
import optuna
import pandas as pd
import pytest
from click.testing import CliRunner
from optuna.trial import TrialState

from signdigits import files
from signdigits.errors import UsageError
from signdigits.tracking import runs
from signdigits.tuning.choice import SCORES, choose_trial
from signdigits.tuning.study import BASELINE

IMAGES = 400


@dataclass
class Recorded:
    """A study whose trials are recorded with the scores of their validation images."""

    study: optuna.Study

    def add(self, scores: np.ndarray, *, state: TrialState = TrialState.COMPLETE, **attributes: Any) -> str:
        """Add a trial, and return the id of its run."""
        with runs.start_run("trial", "trial", parent_run_id=self.study.user_attrs["mlflow_run_id"]) as run:
            mlflow.log_text(files.to_csv(pd.DataFrame({"accuracy": 1 - scores, "brier": scores})), SCORES)
        run_id: str = run.info.run_id
        attributes = {"mlflow_run_id": run_id, **attributes}
        value = float(scores.mean()) if state == TrialState.COMPLETE else None
        self.study.add_trial(optuna.create_trial(state=state, value=value, user_attrs=attributes))
        return run_id


@pytest.fixture
def recorded(store: str) -> Iterator[Recorded]:
    study = optuna.create_study(direction="minimize", study_name="recorded")
    with runs.start_run("study", "recorded") as run:
        study.set_user_attr("mlflow_run_id", run.info.run_id)
        yield Recorded(study)


@pytest.fixture
def first() -> np.ndarray:
    """Scores of the first trial: most images are easy."""
    return np.random.default_rng(0).beta(0.1, 2, IMAGES)


def better(first: np.ndarray, standard_errors: float) -> np.ndarray:
    """Scores that are better than those of the first trial by some standard errors of the paired difference."""
    difference = np.random.default_rng(1).normal(0, 0.05, IMAGES)
    difference -= difference.mean()
    return first + difference - standard_errors * difference.std(ddof=1) / np.sqrt(IMAGES)


def test_best_trial_beyond_luck_is_chosen(recorded: Recorded, first: np.ndarray) -> None:
    recorded.add(first, origin=BASELINE)
    recorded.add(better(first, 1.5))
    recorded.add(better(first, 2.1))
    choice = choose_trial(recorded.study, "val_brier")
    assert choice.trial.number == 2
    assert choice.reason == "trial 2, 0.0048 better than the first in val_brier: 2.1 standard errors"


def test_first_trial_is_kept_otherwise(recorded: Recorded, first: np.ndarray) -> None:
    recorded.add(better(first, 1.9))
    recorded.add(first, origin=BASELINE)
    choice = choose_trial(recorded.study, "val_brier")
    assert choice.trial.number == 1
    assert choice.reason.startswith("trial 1, the first; trial 0 is 0.00")
    assert choice.reason.endswith(" better in val_brier: 1.9 standard errors, which may be luck")


def test_first_trial_may_be_the_best(recorded: Recorded, first: np.ndarray) -> None:
    recorded.add(first, origin=BASELINE)
    recorded.add(better(first, -1))
    assert choose_trial(recorded.study, "val_brier").reason == "trial 0, the first and the best of 2"


def test_best_trial_wins_where_the_first_is_not_complete(recorded: Recorded, first: np.ndarray) -> None:
    recorded.add(first, state=TrialState.FAIL, origin=BASELINE)
    recorded.add(first)
    recorded.add(better(first, 0.1))
    choice = choose_trial(recorded.study, "val_brier")
    assert choice.trial.number == 2
    assert choice.reason == "trial 2, the best of 2; the first is not complete"


@pytest.mark.parametrize("for_good", [False, True])
def test_deleted_trial_is_not_chosen(recorded: Recorded, first: np.ndarray, for_good: bool) -> None:
    """In the UI, and by `mlflow gc`, as of a store that was lost."""
    recorded.add(first, origin=BASELINE)
    mlflow.delete_run(run_id := recorded.add(better(first, 3)))
    if for_good:
        line = ["gc", "--backend-store-uri", mlflow.get_tracking_uri(), "--run-ids", run_id]
        assert CliRunner().invoke(mlflow.cli.cli, line).exit_code == 0
    assert choose_trial(recorded.study, "val_brier").trial.number == 0


def test_missing_scores_keep_the_first_trial(recorded: Recorded, first: np.ndarray) -> None:
    recorded.add(first, origin=BASELINE)
    run_id = recorded.add(better(first, 3))
    shutil.rmtree(mlflow.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    choice = choose_trial(recorded.study, "val_brier")
    assert choice.trial.number == 0
    assert choice.reason == "trial 0, the first; trial 1 may be better, but validation.csv of one of the two is missing"


def test_accuracy_is_maximized(store: str, first: np.ndarray) -> None:
    study = optuna.create_study(direction="maximize", study_name="maximized")
    with runs.start_run("study", "maximized") as run:
        study.set_user_attr("mlflow_run_id", run.info.run_id)
        recorded = Recorded(study)
        recorded.add(better(first, 3))  # the value is a Brier score, and the worst
        recorded.add(first, origin=BASELINE)
    assert choose_trial(study, "val_accuracy").trial.number == 1
    assert choose_trial(study, "val_accuracy").reason == "trial 1, the first and the best of 2"


def test_no_complete_trial_is_an_error(recorded: Recorded, first: np.ndarray) -> None:
    recorded.add(first, state=TrialState.PRUNED)
    with pytest.raises(UsageError, match="study recorded: no complete trial"):
        choose_trial(recorded.study, "val_brier")
