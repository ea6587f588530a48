"""How far a search has come, kept up from trial to trial instead of counted anew: a study may have 100,000 of them."""

import logging
import time
from collections import deque
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from signdigits.errors import StudyError
from signdigits.hyperparameters import StudyParameters
from signdigits.study.outcome import REASON, is_interrupted
from signdigits.study.shorter import Answer, answers, merit

log = logging.getLogger(__name__)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
MAX_FAILURES = 3  # in a row: then the fault lies with the data or the settings


class Progress:
    """The finished trials of a study, their time, the best answer among them, and why the last trials failed."""

    def __init__(self, study: optuna.Study, parameters: StudyParameters) -> None:
        self.name, self.parameters = study.study_name, parameters
        self.started = time.monotonic()
        self.ended = 0  # by themselves: finished, or failed for a reason of their own
        self.finished, self.seconds = 0, 0.0
        self.best: Answer | None = None
        self.reasons: deque[str | None] = deque(maxlen=MAX_FAILURES)
        for trial in study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                self.add(trial)

    @property
    def is_time_up(self) -> bool:
        """Whether no further trial may begin; there always is a first, so that there is a result."""
        limit = self.parameters.timeout
        return bool(limit and self.finished and time.monotonic() - self.started >= limit)

    @property
    def seconds_left(self) -> float:
        left = (
            self.seconds / max(self.finished, 1) * (self.parameters.n_trials - self.finished) / self.parameters.workers
        )
        if self.parameters.timeout:
            left = min(left, max(self.parameters.timeout - (time.monotonic() - self.started), 0))
        return left

    def add(self, trial: FrozenTrial) -> None:
        """Count a trial that has ended."""
        self.reasons.append(trial.user_attrs.get(REASON))
        self.ended += not is_interrupted(trial)
        if trial.state not in FINISHED:
            return
        self.finished += 1
        self.seconds += trial.duration.total_seconds() if trial.duration else 0.0
        for answer in answers(trial):
            if self.best is None or self.merit(answer) > self.merit(self.best):
                self.best = answer

    def merit(self, answer: Answer) -> tuple[float, float]:
        return merit(self.parameters.objective, answer.val_accuracy, answer.val_loss)

    def tell(self, trial: FrozenTrial) -> None:
        """Say in one line what a trial that has been counted tried and reached, the best so far, and the time left."""
        objective = self.parameters.objective
        drawn = "  ".join(f"{name} {shown(value)}" for name, value in trial.params.items())
        value = f"{trial.value:.4f}" if trial.value is not None else "-"
        seconds = trial.duration.total_seconds() if trial.duration else 0.0
        best = f"best {getattr(self.best, objective):.4f} ({self.best})" if self.best else "no best yet"
        log.info(
            "%d/%d  trial %d %s: %s %s  %s  %.0f s;  %s, about %s left",
            self.finished, self.parameters.n_trials, trial.number, trial.state.name.lower(), objective, value, drawn,
            seconds, best, duration(self.seconds_left),
        )  # fmt: skip
        if reason := trial.user_attrs.get(REASON):
            log.warning("trial %d failed: %s", trial.number, reason)

    def refuse_failures(self) -> None:
        """Raise StudyError when the last trials have all failed: more of them would not help."""
        if len(self.reasons) == MAX_FAILURES and all(self.reasons):
            raise StudyError(
                f"study {self.name}: the last {MAX_FAILURES} trials failed, at last with {self.reasons[-1]}"
            )


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
