"""The choice of the trial that is fitted again: the first, unless another is better beyond luck."""

from collections.abc import Collection, Mapping
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


def log_scores(data: Data, images: np.ndarray, by_image: Mapping[str, np.ndarray]) -> None:
    """Log a row for each of `images`, the numbers of photographs, to the active run: path, class, and the scores of the trial."""
    photographs = [data.dataset.photographs[number] for number in images]
    table = pd.DataFrame({
        "path": [photograph.path for photograph in photographs],
        "class": [data.dataset.class_names[photograph.label] for photograph in photographs],
        **by_image,
    })  # fmt: skip
    mlflow.log_text(files.to_csv(table.round(6)), SCORES)


def choose_trial(study: optuna.Study, metric: str, images: Collection[str] | None = None) -> Choice:
    """Choose the first trial, unless the best is better by two standard errors of their paired difference by image.

    The best of a dozen values is often the luckiest: Schneider, Bischl and Feurer, "Overtuning in hyperparameter optimization",
    2025, arXiv:2506.19540. With `images`, paths, only those count. Raises UsageError if no trial is complete.
    """
    ranked = rank_trials(study)
    if images is not None:
        ranked = sorted(ranked, key=lambda trial: float(_read_losses(trial, metric, images).mean()))
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
        gains = _read_losses(first, metric, images) - _read_losses(best, metric, images)
    except (MlflowException, OSError):
        return Choice(first, f"{kept} may be better, but {SCORES} of one of the two is missing")
    difference, error = float(gains.mean()), max(float(gains.std(ddof=1) / np.sqrt(len(gains))), 1e-9)
    if difference > STANDARD_ERRORS * error:
        gain = f"{difference:.4f} better than the first in {metric}: {difference / error:.1f} standard errors"
        return Choice(best, f"trial {best.number}, {gain}")
    gain = f"{difference:.4f} better in {metric}: {difference / error:.1f} standard errors, which may be luck"
    return Choice(first, f"{kept} is {gain}")


def _read_losses(trial: FrozenTrial, metric: str, images: Collection[str] | None) -> np.ndarray:
    """Return what the study minimizes of each validation image, or of those with the paths `images`; an accuracy is negated."""
    table = read_scores(trial)
    if images is not None:
        table = table[table["path"].isin(images)]
    score = metric.rpartition("_")[2]
    losses: np.ndarray = table[score].to_numpy(float) * (-1 if score == "accuracy" else 1)
    return losses


def read_scores(trial: FrozenTrial) -> pd.DataFrame:
    """Return the table of a trial that `log_scores` logged."""
    text = mlflow.artifacts.load_text(f"runs:/{trial.user_attrs['mlflow_run_id']}/{SCORES}")
    return files.read_csv(text, lambda column: column not in ("path", "class"))
