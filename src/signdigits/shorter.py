"""What a training says about shorter ones.

The learning rate follows from the step alone, and so do the batches: with the same seed, a training of 30 epochs contains
those of 1 to 29. What stands in the run stays what was trained; what it says about a shorter one is marked as inferred.
"""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from optuna.trial import FrozenTrial, TrialState

from signdigits import train
from signdigits.data import Images

INFERRED = "inferred"  # the attribute of a trial that holds what it says about a shorter one


@dataclass(frozen=True)
class Answer:
    """What the search may choose: a trial as it was trained or, inferred, a shorter one that its training contains."""

    trial: int
    run_id: str
    params: dict[str, Any]
    value: float
    val_accuracy: float
    temperature: float
    inferred: bool

    def __str__(self) -> str:
        return f"trial {self.trial} after {self.params['epochs']} epochs" if self.inferred else f"trial {self.trial}"


def answers(trial: FrozenTrial) -> list[Answer]:
    """What a finished trial has found: itself if it was trained to its end, and the best shorter one that it knows of."""
    known, run_id = trial.user_attrs, trial.user_attrs.get("mlflow_run_id", "")
    found = []
    if trial.state == TrialState.COMPLETE and trial.value is not None:
        reached = (trial.value, known["val_accuracy"], known["temperature"])
        found.append(Answer(trial.number, run_id, trial.params, *reached, inferred=False))
    if shorter := dict(known.get(INFERRED, {})):
        params = trial.params | {"epochs": shorter.pop("epochs")}
        found.append(Answer(trial.number, run_id, params, **shorter, inferred=True))
    return found


class Shorter(keras.callbacks.Callback):
    """Keeps the weights of the best epoch among those that the search could have ended a training after.

    Those are `shortest` and later; "best" is the highest of the metric `objective`, or the lowest of a loss.
    """

    def __init__(self, objective: str, shortest: int) -> None:
        super().__init__()
        self.objective, self.shortest = objective, shortest
        self.epochs = 0  # none yet
        self.best: dict[str, float] = {}
        self.weights: list[np.ndarray] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        reached = dict(logs or {})
        if epoch + 1 >= self.shortest and (not self.epochs or self.is_better(reached)):
            self.epochs, self.best, self.weights = epoch + 1, reached, self.model.get_weights()

    def is_better(self, reached: dict[str, float]) -> bool:
        new, old = reached[self.objective], self.best[self.objective]
        return new > old if self.objective == "val_accuracy" else new < old

    def inferred(self, images: Images) -> dict[str, Any]:
        """What a shorter training would have reached, and its temperature on `images`; empty if none was better.

        Leaves the network with the weights of that epoch.
        """
        if self.epochs in (0, self.params["epochs"]):
            return {}
        self.model.set_weights(self.weights)
        return {
            "epochs": self.epochs,
            "value": self.best[self.objective],
            "val_accuracy": self.best["val_accuracy"],
            "temperature": train.temperature(self.model, images),
        }
