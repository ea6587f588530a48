"""The choice of the trial that is fitted again: the first, unless another is better beyond luck."""

import io
from dataclasses import dataclass

import mlflow
import numpy as np
import optuna
import pandas as pd
from mlflow.exceptions import MlflowException
from optuna.trial import FrozenTrial

from signdigits import files
from signdigits.data.loading import Data
from signdigits.errors import UsageError
from signdigits.tuning.study import BASELINE, rank_trials

SCORES = "validation.csv"  # artifact of a trial's run: the scores of each validation image
# By which another trial must be better than the first. Between seeds of one trial the value differs by 1.5 standard errors, and
# the best of eleven is often the luckiest: docs/training.md.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Choice:
    """The trial that is fitted again, and why."""

    trial: FrozenTrial
    reason: str


def log_scores(data: Data, by_image: dict[str, np.ndarray]) -> None:
    """Log a row per validation image to the active run: path, class, and the scores of the trial."""
    photographs = [data.dataset.photographs[number] for number in data.split.validation]
    table = pd.DataFrame({
        "path": [photograph.path for photograph in photographs],
        "class": [data.dataset.class_names[photograph.label] for photograph in photographs],
        **by_image,
    })  # fmt: skip
    mlflow.log_text(files.to_csv(table.round(6)), SCORES)


def choose_trial(study: optuna.Study, metric: str) -> Choice:
    """Choose the first trial, unless the best is better by two standard errors of their paired difference by image.

    The best of a dozen values is often the luckiest: Schneider, Bischl and Feurer, "Overtuning in hyperparameter optimization",
    2025, arXiv:2506.19540. Raises UsageError if no trial is complete.
    """
    ranked = rank_trials(study)
    if not ranked:
        raise UsageError(
            f"study {study.study_name}: no complete trial (or its run was deleted in the UI); raise --timeout or --n_trials"
        )
    best = ranked[0]
    first = next((trial for trial in ranked if trial.user_attrs.get("origin") == BASELINE), None)
    if first is None:
        return Choice(best, f"trial {best.number}, the best of {len(ranked)}; the first is not complete")
    if best.number == first.number:
        return Choice(first, f"trial {first.number}, the first and the best of {len(ranked)}")
    kept = f"trial {first.number}, the first; trial {best.number}"
    try:
        difference, error = _compare_trials(first, best, metric)
    except (MlflowException, OSError):
        return Choice(first, f"{kept} may be better, but {SCORES} of one of the two is missing")
    if difference > STANDARD_ERRORS * error:
        gain = f"{difference:.4f} better than the first in {metric}: {difference / error:.1f} standard errors"
        return Choice(best, f"trial {best.number}, {gain}")
    gain = f"{difference:.4f} better in {metric}: {difference / error:.1f} standard errors, which may be luck"
    return Choice(first, f"{kept} is {gain}")


def _compare_trials(first: FrozenTrial, best: FrozenTrial, metric: str) -> tuple[float, float]:
    """Return by how much `best` is better than `first` in the mean over the validation images, and the standard error of that."""
    score = metric.rpartition("_")[2]
    scores = [_read_scores(trial)[score].to_numpy() for trial in (first, best)]
    gains = scores[1] - scores[0] if score == "accuracy" else scores[0] - scores[1]
    return float(gains.mean()), max(float(gains.std(ddof=1) / np.sqrt(len(gains))), 1e-9)


def _read_scores(trial: FrozenTrial) -> pd.DataFrame:
    run_id = trial.user_attrs["mlflow_run_id"]
    return pd.read_csv(io.StringIO(mlflow.artifacts.load_text(f"runs:/{run_id}/{SCORES}")))
