"""How a trial ended, for whoever hears of it without having trained."""

from dataclasses import dataclass

from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True)
class Outcome:
    """How a trial ended, and with which value if it came to its end.

    A trial that failed has its reason noted on it; one that failed without was interrupted.
    """

    state: TrialState
    value: float | None = None


FAILED = Outcome(TrialState.FAIL)
REASON = "failure_reason"


def is_interrupted(trial: FrozenTrial) -> bool:
    """Whether the trial failed for no reason of its own."""
    return trial.state == TrialState.FAIL and REASON not in trial.user_attrs
