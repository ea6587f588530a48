"""The progress of a search: a line for each trial, with the time left."""

import logging
import time
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from signdigits.config import StudyParameters
from signdigits.tuning.study import FAILURE_REASON, FINISHED

log = logging.getLogger(__name__)


class SearchProgress:
    """An Optuna callback that logs a line for each trial."""

    def __init__(self, parameters: StudyParameters) -> None:
        self.parameters, self.started = parameters, time.monotonic()

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        reason = trial.user_attrs.get(FAILURE_REASON)
        log.info("%s", self.line(study, trial))
        if reason:
            log.warning("trial %d failed: %s", trial.number, reason)

    @property
    def is_time_up(self) -> bool:
        return bool(self.parameters.timeout) and time.monotonic() - self.started >= self.parameters.timeout

    def line(self, study: optuna.Study, trial: FrozenTrial) -> str:
        """Return a line with the trial's parameters and value, the best value and the time left."""
        metric, n_trials = self.parameters.metric, self.parameters.n_trials
        trials = study.get_trials(deepcopy=False, states=FINISHED)
        params = "  ".join(f"{name} {format_value(value)}" for name, value in trial.params.items())
        value = f"{trial.value:.4f}" if trial.value is not None else "-"
        try:
            best = f"best {study.best_value:.4f} (trial {study.best_trial.number})"
        except ValueError:
            best = "no best yet"
        left = _format_duration(self.seconds_left(trials))
        return (
            f"{len(trials)}/{n_trials}  trial {trial.number} {trial.state.name.lower()}: {metric} {value}  {params}  "
            f"{_trial_seconds(trial):.0f} s;  {best}, about {left} of the search left"
        )

    def seconds_left(self, trials: list[FrozenTrial]) -> float:
        mean = sum(map(_trial_seconds, trials)) / max(len(trials), 1)
        left = mean * (self.parameters.n_trials - len(trials)) / self.parameters.workers
        if self.parameters.timeout:
            left = min(left, max(self.parameters.timeout - (time.monotonic() - self.started), 0))
        return left


def _trial_seconds(trial: FrozenTrial) -> float:
    return trial.duration.total_seconds() if trial.duration else 0.0


def format_value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
